"""The short form of the fuzzing that `make fuzz` does at length."""

from __future__ import annotations

from benchmarks.fuzz import fake_server, fuzz


def test_no_request_breaks_the_server_or_stays_in_it() -> None:
    with fake_server() as url:
        result = fuzz(url, 240)
    assert not result.failures, "\n\n".join(result.failures)
    assert not result.leaked
    assert result.cases >= 240
    assert set(result.statuses) <= {200, 400, 404, 415}
    # Else most cases would end at the first field that is wrong.
    paths = ("chat/completions", "completions", "responses", "responses/input_tokens")
    for path in (*(f"/v1/{path}" for path in paths), "/tokenize"):
        assert result.succeeded[f"POST {path}"] >= 5, result.line()
