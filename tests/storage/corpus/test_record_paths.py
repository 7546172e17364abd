from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.corpus.record_paths import cut_path, domain_of, record_path, store_name

calm = settings(deadline=None, max_examples=200)
domains = st.lists(
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=8),
    min_size=1,
    max_size=3,
).map("/".join)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("algebra/linear", "algebra/linear"),
        (" /Algebra/ Linear algebra /\n", "Algebra/Linear algebra"),
        ("C++", "C++"),
        ("数学", "数学"),
        ("../..", "../.."),
    ],
)
def test_a_path_as_a_field_holds_it(value: str, path: str) -> None:
    assert record_path(value) == path


@pytest.mark.parametrize(
    ("value", "why"),
    [("", "it is empty"), (" / ", "it is empty"), ("a//b", "a part of it is empty"), ("a/b\tc", r"'b\\tc' cannot be")],
)
def test_what_is_no_path(value: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        record_path(value)


def test_cutting() -> None:
    assert [cut_path("a/b/c", depth) for depth in (None, 1, 2, 3, 4)] == ["a/b/c", "a", "a/b", "a/b/c", "a/b/c"]


@pytest.mark.parametrize("domain", ["math", "zh_books", "a.b-c_D9", "x" * 100])
def test_a_domain_without_a_path_has_the_name_that_it_always_had(domain: str) -> None:
    assert store_name(domain) == f"{domain}.zarr"


def test_names_by_hand() -> None:
    assert store_name("math/Algebra/Linear algebra") == "math~Algebra~Linear=20algebra.zarr"
    assert store_name("code/C++") == "code~C=2B=2B.zarr"
    assert store_name("a~b=c/é") == "a=7Eb=3Dc~=C3=A9.zarr"


@calm
@given(domain=domains)
def test_a_name_is_one_folders_and_gives_the_domain_back(domain: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._~=-]+\.zarr", store_name(domain))
    assert domain_of(store_name(domain)) == domain


@calm
@given(one=domains, other=domains)
def test_two_domains_never_share_a_name(one: str, other: str) -> None:
    assert (store_name(one) == store_name(other)) is (one == other)
