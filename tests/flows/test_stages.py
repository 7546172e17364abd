"""The flows as Prefect sees them: sections as parameters, checked before anything starts."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from small_run import small_config

from flows import stages
from flows.config import Config


@pytest.mark.parametrize("name", ["train_student", "rebalance", "distill"])
def test_every_section_is_a_parameter_of_its_own(name: str) -> None:
    schema = parameter_schema(getattr(stages, name))
    assert set(schema.properties) - {"force"} == set(Config.model_fields)
    assert set(schema.required) == {"run", "root", "domains", "teacher", "student", "train"}
    learning_rate = schema.definitions["TrainConfig"]["properties"]["learning_rate"]
    assert learning_rate["description"] == "Peak learning rate, reached after the warm-up.", (
        "the form says what a field is"
    )


def test_flows_take_what_the_configuration_gives() -> None:
    config = Config.model_validate(small_config())
    taken = stages.distill.validate_parameters(stages.flow_parameters(config))
    assert taken["mixture"] == config.mixture
    assert taken["domains"] == config.domains


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("train", {"steps": 0, "batch_size": 1}, "train.steps: Input should be greater than or equal to 1"),
        ("teacher", {"model": "m", "kk": 1}, "teacher.kk: Extra inputs are not permitted"),
        ("method", "magic", "method: Input should be 'ddk'"),
    ],
)
def test_a_bad_value_is_refused_before_anything_starts(section: str, value: Any, message: str) -> None:
    parameters = {**small_config(), section: value}
    with pytest.raises(ParameterTypeError, match=message):
        stages.distill.validate_parameters(parameters)
