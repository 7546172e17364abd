"""The sections of the configuration that describe training: the student, the loss, the optimizer, and the method ted.

This module imports nothing heavy, so that a configuration is read quickly.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ddk.section import MOST_STEPS, Section

Parallel = Literal["ddp", "fsdp"]
Tail = Literal["bucket", "renormalise", "residual", "sampled"]
Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Schedule = Literal["cosine", "wsd"]
Overtrained = Literal["warn", "cap", "stop"]
EPOCH_LIMIT = 4.0
"""Muennighoff et al., NeurIPS 2023, 'Scaling Data-Constrained Language Models' (arXiv 2305.16264): up to four epochs,
repeated text is worth nearly as much as new text."""


class ContextConfig(Section):
    """A student for longer contexts than its blocks (docs/context.md)."""

    target: int = Field(ge=2, le=2**24)
    """Number of positions that the saved student is for. Its config.json declares them, and divides positions by
    target/trained."""
    max_scale: int = Field(default=20, ge=1, le=10**4)
    """Largest scale G: a block's positions are divided by a scale g, which it draws from 1 to G at each step. At least
    target/trained."""
    saved_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the blocks that are shown at the scale target/trained, at which the saved student is read. The others
    draw theirs from 1 to G; with 0, all do, as in the paper."""
    offset_after: int = Field(default=4, ge=0, le=2**24)
    """Number of positions at the start of a block that are not moved; those behind are moved by a random offset."""
    distil: bool = True
    """Whether blocks with such positions have the divergence from the teacher, whose targets are of ordinary positions;
    otherwise they are trained on cross-entropy alone."""
    trained: int | None = Field(default=None, ge=1, le=2**24)
    """Number of positions that the student knows before the training (the paper's L). Default: what its config.json
    declares, which for some models is more than they were trained on."""


class StudentConfig(Section):
    """Which model is trained."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face model with safetensors weights, or its name on the hub."""
    revision: str | None = Field(default=None, min_length=1)
    """Commit, branch or tag, for a name on the hub."""
    trust_remote_code: bool = False
    """Whether code in the model's folder may be executed. Leave it off unless you have read that code."""
    context: ContextConfig | None = None
    """Prepares the student for longer contexts than its blocks: `{target: 16384}` (docs/context.md). Off by default."""


class LossConfig(Section):
    """Settings of the loss, CE + γ·divergence."""

    gamma: float = Field(default=0.2, ge=0.0, le=1e6)
    """Weight γ of the divergence; 0 trains on cross-entropy only and reads no targets."""
    gamma_of: dict[str, float] = Field(default_factory=dict)
    """Weight γ of single domains, in place of `gamma`: `{code: 0.1, web: 1.0}`. A domain's weight holds for all domains
    below it that have none of their own. Domains that are not named have `gamma`."""
    gamma_until: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Number of optimizer steps after which the student trains on cross-entropy alone. By default, γ holds to the
    end."""
    min_entropy: float = Field(default=0.0, ge=0.0, le=20.0)
    """Entropy of the teacher's distribution, in nats, below which a position has no divergence: where the teacher is
    certain, its distribution says little more than the text. Needs stores that hold the entropy, as captured ones
    do."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Temperature T of both distributions in the divergence. If it is not 1, it must be one of
    `teacher.tail_temperatures`, or `tail` must be 'renormalise'."""
    divergence: Divergence = "forward_kl"
    """'forward_kl' (teacher ‖ student), 'reverse_kl' (student ‖ teacher) or 'jensen_shannon'."""
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """With 'jensen_shannon': weight β of the teacher in the mean of both distributions. Near 0 the divergence behaves
    like forward_kl, near 1 like reverse_kl."""
    tail: Tail = "bucket"
    """How the teacher's probability outside the stored tokens is treated: 'bucket', 'renormalise', 'residual', or
    'sampled' (which uses random draws instead of the top k)."""
    mask_document_starts: bool = False
    """Whether to exclude the first token of each document from the loss, as nothing before it in the block helps to
    predict it."""

    @field_validator("gamma_of")
    @classmethod
    def _weights_are_not_negative(cls, weights: dict[str, float]) -> dict[str, float]:
        for domain, weight in weights.items():
            if not 0.0 <= weight <= 1e6:
                raise ValueError(f"the weight of '{domain}' is {weight}; it must lie in [0, 1000000]")
        return weights

    @model_validator(mode="after")
    def _is_known(self) -> LossConfig:
        if self.gamma == 0.0 and (self.gamma_of or self.gamma_until is not None or self.min_entropy):
            field = "gamma_of" if self.gamma_of else "gamma_until" if self.gamma_until is not None else "min_entropy"
            raise ValueError(f"{field} is set and gamma is 0, so that no targets are read; set gamma too, or leave it")
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
    """Total number of optimizer steps."""
    batch_size: int = Field(ge=1, le=10**6)
    """Number of blocks per optimizer step, over all devices."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Number of blocks per forward and backward pass of one device; a smaller value needs less memory. It must divide a
    device's share of batch_size. Default: that whole share."""
    learning_rate: float = Field(default=3e-5, gt=0.0, le=10.0)
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: float = Field(default=3e-6, ge=0.0)
    """Learning rate at the last step."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up. 'cosine': over all steps. 'wsd' (warm-up, stable, decay): it stays
    at its peak until the last part of the run, so that a longer run can branch off from any checkpoint before that
    part."""
    decay_share: float = Field(default=0.1, gt=0.0, le=1.0)
    """With schedule wsd: share of the steps, at the end, over which the learning rate falls."""
    warmup_steps: int = Field(default=1000, ge=0, le=MOST_STEPS)
    """Number of steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.1, ge=0.0, le=1e6)
    """Weight decay of AdamW. It applies to matrices, not to biases and norms."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay rate of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay rate of AdamW's second moment."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null turns clipping off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. 'auto' takes the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the forward pass; weights and optimizer are always float32. 'auto' is bf16 on a GPU that supports
    it."""
    activation_checkpointing: bool = False
    """Whether to recompute activations in the backward pass; this saves memory and takes about a third more time."""
    processes: int | Literal["auto"] = "auto"
    """Number of processes on this machine, one per device. 'auto' is one per GPU, or one if there is no GPU. The number
    must divide batch_size."""
    nodes: int = Field(default=1, ge=1, le=10**5)
    """Number of machines, each with the same number of processes; docs/training.md explains how to start the others."""
    rendezvous: str = "127.0.0.1:0"
    """HOST:PORT at which several machines meet: an address of the first machine that the others can reach."""
    parallel: Parallel = "ddp"
    """How several processes share the work: 'ddp' (each holds the whole student) or 'fsdp' (FSDP2: each holds a share
    of the weights, gradients and optimizer state, for students too large for one device)."""
    compile: bool = False
    """Whether to compile the decoder's layers with torch.compile: training starts more slowly, and steps on a GPU are
    faster."""
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_STEPS)
    """Number of newest checkpoints to keep."""
    shuffle_mib: int = Field(default=2048, ge=1, le=2**30)
    """Amount of data that is shuffled together, over all domains, in MiB (decoded; on S3 it is about a third of that).
    In each epoch, a domain's shards are read in random order, as many at a time as fit into this amount, so that each
    shard is fetched once. Domains that fit entirely are shuffled as a whole."""
    overtrained: Overtrained = "warn"
    """What happens once a domain is seen too often (docs/training.md describes the alarms). 'warn' says so and goes on;
    'cap' draws the domain no more often than the floor of the mixture, (1 − α)/N, from then on; 'stop' ends the run at
    that measurement."""
    epoch_limit: float | None = Field(default=EPOCH_LIMIT, gt=0.0, le=1e9)
    """Number of epochs (times that a domain's train blocks were read) beyond which a domain is seen too often; null
    leaves the number out. Source of the default: Muennighoff et al. 2023, 'Scaling Data-Constrained Language
    Models'."""
    from_run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@[0-9]{1,9})?$")
    """RUN or RUN@STEP: another run in the same root, from whose checkpoint (by default the newest) this one goes on, as
    `ddk train --from` sets it. Steps count on from there, and `steps` is the total. See docs/training.md."""
    from_optimizer: bool = True
    """With from_run: whether the optimizer's moments are taken along; otherwise only the weights are, and the learning
    rate warms up anew."""
    max_hours: float | None = Field(default=None, gt=0.0, le=1e6)
    """Hours after which this process stops training at a checkpoint, before an interval that would end later. The run
    stays unfinished; the same command goes on. By default, there is no limit."""
    log_every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Number of steps between log lines. There is also a line at the end of each interval."""

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

    def stops_after(self, seconds: float) -> bool:
        """Whether a process that has trained for so long is to stop."""
        return self.max_hours is not None and seconds > 3600.0 * self.max_hours

    def share(self, ranks: int) -> int:
        """Number of blocks of a step that each rank takes.

        Raises:
            ValueError: the batch cannot be cut into equal shares, or a share into micro-batches.
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
    """Weight λ of the sum of the layers' distances. The distance of a layer is about 2 if student and teacher have
    nothing in common, and 0 if they agree."""
    layers: int | None = Field(default=None, ge=1, le=10**5)
    """Number of matched pairs of layers, spread evenly over the depth of both models; the last layers are always
    matched. Default: the number of layers of the shallower model."""
    filter_steps: int = Field(default=500, ge=0, le=MOST_STEPS)
    """Number of steps of stage 1, in which the filters are trained."""
    filter_batch_size: int = Field(default=8, ge=1, le=10**6)
    """Number of blocks per step of stage 1. Each step projects twice as many hidden states as there are pairs onto the
    vocabulary."""
    filter_learning_rate: float = Field(default=1e-3, gt=0.0, le=10.0)
    """Learning rate of Adam in stage 1; it falls linearly to 0. In stage 2 the student's filters train at the student's
    rate."""
