"""Claims on both kinds of storage, of threads, of killed processes, and of owners on other machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from repository import REPOSITORY

from storage.files import claims as storage_claims
from storage.files import uri
from storage.files.claims import Claims, remove_claims


def test_one_of_two_gets_it_and_the_other_once_it_is_let_go(place: str) -> None:
    with Claims(place) as second:
        with Claims(place) as first:
            assert first.take("train-00000001")
            assert first.take("train-00000001"), "asked again, it still is"
            assert not second.take("train-00000001")
            assert second.take("train-00000002")
            assert first.holds("train-00000001")
            assert not second.holds("train-00000001")
        assert second.take("train-00000001")
        assert second.holds("train-00000001")


def test_of_many_who_reach_for_it_at_once_one_gets_it(place: str) -> None:
    everyone = [Claims(place) for _ in range(8)]
    barrier = threading.Barrier(len(everyone))

    def reach(one: Claims) -> list[str]:
        barrier.wait()
        return [what for what in ("a", "b", "c") if one.take(what)]

    with ThreadPoolExecutor(len(everyone)) as executor:
        taken = list(executor.map(reach, everyone))
    assert sorted(what for each in taken for what in each) == ["a", "b", "c"]
    for one in everyone:
        one.__exit__(None, None, None)


def test_waits_for_its_turn(place: str) -> None:
    said: list[str] = []
    with Claims(place) as first:
        assert first.take("all")
        with Claims(place) as second:
            waiting = threading.Thread(target=second.wait_for, args=("all", lambda: said.append("waiting")))
            waiting.start()
            waiting.join(0.5)
            assert waiting.is_alive()
            first.__exit__(None, None, None)
            waiting.join(20)
            assert not waiting.is_alive()
            assert second.holds("all")
    assert said == ["waiting"]


def start_a_holder(place: str) -> subprocess.Popen[str]:
    code = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from storage.files.claims import Claims
claims = Claims({place!r})
assert claims.take("all")
print("taken", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_what_a_killed_process_held_is_taken_over_at_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_claims.time, "monotonic", lambda: 1000.0)  # no patience can run out
    process = start_a_holder(place)
    with Claims(place) as ours:
        assert not ours.take("all")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert ours.take("all"), "its process is gone; nobody need be patient"


def test_a_later_process_of_the_same_number_is_another(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    born = psutil.Process().create_time()
    monkeypatch.setattr(storage_claims, "_started", lambda process: born - 1000.0)
    with Claims(place) as first, Claims(place) as second:
        assert first.take("all")
        monkeypatch.setattr(storage_claims, "_started", lambda process: born)
        assert second.take("all")
        assert not first.holds("all")


def test_an_owner_on_another_machine_lives_as_long_as_its_sign_changes(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(storage_claims.time, "monotonic", lambda: now)
    with Claims(place) as there, Claims(place) as here:
        monkeypatch.setattr(storage_claims, "_machine", lambda: "there")
        assert there.take("all")
        monkeypatch.setattr(storage_claims, "_machine", lambda: "here")
        assert not here.take("all"), "seen for the first time: who knows how long it has been dead"
        now += storage_claims.PATIENCE - 1
        assert not here.take("all")
        monkeypatch.setattr(storage_claims, "_machine", lambda: "there")
        there._write_sign(7)
        monkeypatch.setattr(storage_claims, "_machine", lambda: "here")
        now += storage_claims.PATIENCE - 1
        assert not here.take("all"), "it has given a sign since"
        now += storage_claims.PATIENCE
        assert here.take("all")
        assert not there.holds("all"), "so that it does not write, should it wake up"


def test_gives_signs_while_it_holds(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_claims, "SECONDS_BETWEEN_SIGNS", 0.05)
    owners = f"{place}/claims/owners"
    with Claims(place) as claims:
        assert uri.list_names(owners) == [], "nothing is written where nothing is claimed"
        claims.take("all")
        (name,) = uri.list_names(owners)
        deadline = time.monotonic() + 30
        while uri.read_json(f"{owners}/{name}")["sign"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert uri.list_names(owners) == []


def test_nothing_is_left_of_claims_on_a_complete_store(tmp_path: Path) -> None:
    place = str(tmp_path)
    with Claims(place) as claims:
        claims.take("train-00000000")
        remove_claims(place)
        claims._write_sign(9)  # as the thread may, at the wrong moment
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"3", b"{}", b'{"owner": 3}', b'{"owner": "../../x"}', b"[" * 100_000, b"\xff\xfe"]
)
def test_a_claim_that_cannot_be_read_is_nobodys(tmp_path: Path, damaged: bytes) -> None:
    with Claims(str(tmp_path)) as first, Claims(str(tmp_path)) as second:
        assert first.take("all")
        (tmp_path / "claims" / "all.0000.json").write_bytes(damaged)
        assert second.take("all")
        assert not first.holds("all")


@pytest.mark.parametrize(
    "change",
    [
        {"process": -1},
        {"process": 10**30},
        {"process": "1"},
        {"process": None},
        {"started": "now"},
        {"machine": 3},
        {"machine": "there", "sign": [10**30]},
        None,
    ],
)
def test_a_sign_that_cannot_be_read_is_waited_for_no_longer_than_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object] | None
) -> None:
    now = 1000.0
    monkeypatch.setattr(storage_claims.time, "monotonic", lambda: now)
    with Claims(str(tmp_path)) as first, Claims(str(tmp_path)) as second:
        assert first.take("all")
        (name,) = uri.list_names(f"{tmp_path}/claims/owners")
        sign = uri.read_json(f"{tmp_path}/claims/owners/{name}")
        uri.write_json(f"{tmp_path}/claims/owners/{name}", [sign] if change is None else {**sign, **change})
        assert not second.take("all")
        now += storage_claims.PATIENCE + 1
        assert second.take("all")


def test_who_only_watches_sees_whether_an_owner_elsewhere_lives(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, sign = storage_claims.Watch(), {"machine": "elsewhere", "process": 1, "started": 1.0}
    assert watch.look(place) == "dead", "nobody is there"
    uri.write_json(f"{place}/claims/owners/{'a' * 32}.json", {**sign, "sign": 0})
    assert watch.look(place) == "unknown"
    assert watch.look(place) == "unknown", "not yet long enough"
    uri.write_json(f"{place}/claims/owners/{'a' * 32}.json", {**sign, "sign": 1})
    assert watch.look(place) == "alive"
    silent = storage_claims.Watch()
    assert silent.look(place) == "unknown"
    monkeypatch.setattr(storage_claims, "PATIENCE", 0.0)
    assert silent.look(place) == "dead", "its sign has not changed"
    with Claims(place) as ours:
        assert ours.take("all")
        assert silent.look(place) == "alive", "of several the one that lives counts"
