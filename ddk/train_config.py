"""What a configuration says of a student's training: the model, the loss, the optimizer, and the method ted.

Nothing heavy is imported here, so that a configuration is read in a moment.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ddk.section import MOST_STEPS, Section

Parallel = Literal["ddp", "fsdp"]
Tail = Literal["bucket", "renormalise", "residual", "sampled"]
Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class StudentConfig(Section):
    """Which model is trained."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face model with safetensors weights, or its name on the hub."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag, for a name on the hub."""
    trust_remote_code: bool = False
    """Whether the model's folder may run code of its own. Leave it off unless you have read that code."""


class LossConfig(Section):
    """CE + γ·divergence and its settings."""

    gamma: float = Field(default=0.2, ge=0.0, le=1e6)
    """Weight γ of the divergence; 0 trains on cross-entropy alone and reads no targets."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Temperature T of both distributions in the divergence. Other than 1, `teacher.tail_temperatures` must name it,
    or `tail` must be 'renormalise'."""
    divergence: Divergence = "forward_kl"
    """'forward_kl' (teacher ‖ student), 'reverse_kl' (student ‖ teacher) or 'jensen_shannon'."""
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Of 'jensen_shannon': the teacher's share β of the mean of the two. Near 0 it is like forward_kl, near 1 like
    reverse_kl."""
    tail: Tail = "bucket"
    """What becomes of the teacher's probability outside the stored tokens: 'bucket', 'renormalise', 'residual', or
    'sampled' (random draws in place of the top k)."""
    mask_document_starts: bool = False
    """Whether the first token of a document, which nothing before it in the block foretells, carries no loss."""

    @model_validator(mode="after")
    def _is_known(self) -> LossConfig:
        if self.tail == "residual" and self.divergence == "reverse_kl":
            raise ValueError(
                "divergence reverse_kl with tail 'residual' is infinite: it gives no probability to tokens outside the "
                "stored ones; set tail: bucket"
            )
        if self.tail == "sampled" and (self.divergence != "forward_kl" or self.temperature != 1.0):
            raise ValueError(
                "tail 'sampled' is drawn at temperature 1 and estimates the forward KL alone; set divergence: "
                "forward_kl and temperature: 1.0, or tail: bucket"
            )
        return self

    @property
    def tail_temperature(self) -> float | None:
        """The temperature at which the tail's mass must be stored; None where that at 1 is enough."""
        return self.temperature if self.temperature != 1.0 and self.tail != "renormalise" and self.gamma else None

    @property
    def needs_draws(self) -> bool:
        return self.tail == "sampled" and self.gamma > 0.0


class TrainConfig(Section):
    """How the student is trained."""

    steps: int = Field(ge=1, le=MOST_STEPS)
    """Optimizer steps in all."""
    batch_size: int = Field(ge=1, le=10**6)
    """Blocks an optimizer step (over all devices)."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Blocks a forward and backward pass of one device; smaller needs less memory. Must divide a device's share of
    batch_size. Default: all of that share."""
    learning_rate: float = Field(default=3e-5, gt=0.0, le=10.0)
    """Peak, reached after the warm-up."""
    min_learning_rate: float = Field(default=3e-6, ge=0.0)
    """Where the cosine ends, at the last step."""
    warmup_steps: int = Field(default=1000, ge=0, le=MOST_STEPS)
    """Steps of linear warm-up from 0."""
    weight_decay: float = Field(default=0.1, ge=0.0, le=1e6)
    """AdamW's, on matrices; biases and norms have none."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null for no clipping."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; weights and optimizer are always float32. 'auto': bf16 on a GPU that has it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    processes: int | Literal["auto"] = "auto"
    """Processes on this machine, one a device. 'auto': one for each GPU, or one where there is none. They must
    divide batch_size."""
    nodes: int = Field(default=1, ge=1, le=10**5)
    """Machines, each with as many processes; see docs/training.md for how the others are started."""
    rendezvous: str = "127.0.0.1:0"
    """HOST:PORT at which the machines meet, for more than one: an address of the first that the others reach."""
    parallel: Parallel = "ddp"
    """With more than one process: 'ddp' (the whole student on each) or 'fsdp' (FSDP2: each holds a share of weights,
    gradients and optimizer, for students that do not fit one device with theirs)."""
    compile: bool = False
    """Compile the decoder's layers with torch.compile: slower to start, faster steps on a GPU."""
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_STEPS)
    """How many of the newest checkpoints stay."""
    shuffle_mib: int = Field(default=2048, ge=1, le=2**30)
    """Data that is shuffled together, over all domains, in MiB (decoded; on S3 about a third of it). An epoch goes
    through a domain's shards in random order, as many at a time as find room here, so that each is fetched once an
    epoch. Domains that find room whole are shuffled as a whole."""
    log_every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two lines of the log, besides the one at the end of each interval."""

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.processes != "auto" and self.processes < 1:
            raise ValueError(f"processes is {self.processes}; it must be 'auto', or at least 1")
        if self.processes != "auto":
            self.share(self.processes * self.nodes)
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self

    def share(self, ranks: int) -> int:
        """Blocks of a step that each of so many ranks takes.

        Raises:
            ValueError: the batch cannot be cut into equal shares, or these into micro-batches.
        """
        share, rest = divmod(self.batch_size, ranks)
        if rest:
            raise ValueError(f"batch_size {self.batch_size} cannot be shared equally by {ranks} processes")
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide the {share} blocks of each of {ranks} "
                f"processes"
            )
        return share


class TedConfig(Section):
    """Task-aware layer-wise distillation, for method ted."""

    weight: float = Field(default=0.02, gt=0.0, le=1e6)
    """Weight λ of the layers' distances, summed over the layers; a layer's is about 2 where student and teacher have
    nothing in common, 0 where they agree."""
    layers: int | None = Field(default=None, ge=1, le=10**5)
    """Matched pairs of layers, spread evenly over both depths; the last is always matched. Default: as many as the
    shallower model has."""
    filter_steps: int = Field(default=500, ge=0, le=MOST_STEPS)
    """Steps of stage 1, in which the filters are trained."""
    filter_batch_size: int = Field(default=8, ge=1, le=10**6)
    """Blocks a step of stage 1. A step projects twice as many hidden states as there are pairs onto the vocabulary."""
    filter_learning_rate: float = Field(default=1e-3, gt=0.0, le=10.0)
    """Adam's in stage 1, falling to 0 linearly. In stage 2 the student's filters train at the student's rate."""
