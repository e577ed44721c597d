"""What notices new rating files, and what tells of failed runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from llmrec_assets.ground import alerts
from llmrec_assets.ground.incoming_files import kept_name
from llmrec_assets.orchestration.alerts import alert_webhook, email_sensor
from llmrec_assets.orchestration.sensors import new_ratings

if TYPE_CHECKING:
    from conftest import Home

SOURCE = ("movielens_files", "users", "movies", "incoming_ratings", "ratings")
HEADER = "user_id,movie_id,rating,timestamp\n"


@pytest.fixture
def place(new_home: Callable[..., Home]) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    home = new_home()
    with home.instance() as instance:
        yield home, instance


def drop(home: Home, name: str, rows: str, seconds: float = 60) -> Path:
    path = home.location / "incoming" / "sample" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + rows)
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def look(home: Home, instance: dg.DagsterInstance) -> list[tuple[str, str]]:
    """(partition, run key) of everything the sensor asks for now."""
    with dg.build_sensor_context(
        instance=instance,
        repository_def=home.defs().get_repository_def(),
        resources={"storage": home.defs().resources["storage"]},
    ) as context:
        requests = new_ratings.evaluate_tick(context).run_requests or []
    return [(str(request.partition_key), str(request.run_key)) for request in requests]


def run_source(home: Home, instance: dg.DagsterInstance) -> None:
    assert home.materialize(instance, *SOURCE, job="source_data", partition="sample").success


def test_it_is_off_and_starts_the_source_job() -> None:
    assert new_ratings.default_status == dg.DefaultSensorStatus.STOPPED
    assert new_ratings.job_name == "source_data"


def test_no_files_ask_for_nothing(place: tuple[Home, dg.DagsterInstance]) -> None:
    assert look(*place) == []


def test_a_new_file_asks_once_and_its_run_ends_it(place: tuple[Home, dg.DagsterInstance]) -> None:
    home, instance = place
    drop(home, "a.csv", "1,83,1,1900000000\n")
    ((partition, key),) = look(home, instance)
    assert partition == "sample"
    assert look(home, instance) == [(partition, key)]  # Dagster runs a key once
    run_source(home, instance)
    assert look(home, instance) == []
    drop(home, "b.csv", "1,83,2,1900000001\n")
    ((_, other),) = look(home, instance)
    assert other != key
    run_source(home, instance)
    assert look(home, instance) == []


def test_a_file_of_the_same_name_with_other_content_is_another(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    drop(home, "a.csv", "1,83,1,1900000000\n")
    first = look(home, instance)
    drop(home, "a.csv", "1,83,2,1900000000\n")
    assert look(home, instance) != first


def test_a_file_that_is_being_written_is_not_seen_yet(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    drop(home, "a.csv", "1,83,1,19", seconds=0)
    assert look(home, instance) == []


def test_a_bad_file_asks_once(place: tuple[Home, dg.DagsterInstance]) -> None:
    home, instance = place
    drop(home, "a.csv", "1,83,9,1900000000\n")
    assert len(look(home, instance)) == 1
    run_source(home, instance)
    assert look(home, instance) == []


def test_a_run_killed_between_accepting_and_publishing_is_asked_for_again(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    """The file does not wait any more, and no table holds it."""
    home, instance = place
    path = drop(home, "a.csv", "1,83,1,1900000000\n")
    ((_, before),) = look(home, instance)
    (path.parent / "accepted").mkdir()
    path.rename(path.parent / "accepted" / kept_name(path))
    ((_, after),) = look(home, instance)
    assert after != before
    run_source(home, instance)
    assert look(home, instance) == []


def test_taking_the_last_file_back_is_asked_for(place: tuple[Home, dg.DagsterInstance]) -> None:
    home, instance = place
    path = drop(home, "a.csv", "1,83,1,1900000000\n")
    run_source(home, instance)
    (accepted,) = (path.parent / "accepted").iterdir()
    accepted.unlink()
    assert len(look(home, instance)) == 1
    run_source(home, instance)
    assert look(home, instance) == []


def test_a_run_that_ended_before_the_ratings_is_asked_for_again(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    run_source(home, instance)
    drop(home, "a.csv", "1,83,1,1900000000\n")
    some = SOURCE[:-1]
    assert home.materialize(instance, *some, job="source_data", partition="sample").success
    assert len(look(home, instance)) == 1
    run_source(home, instance)
    assert look(home, instance) == []


def test_while_the_source_job_runs_nothing_is_asked_for(
    place: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = place
    drop(home, "a.csv", "1,83,1,1900000000\n")
    run = instance.create_run_for_job(
        home.defs().resolve_job_def("source_data"),
        tags={"dagster/partition": "sample"},
        status=dg.DagsterRunStatus.STARTED,
    )
    assert look(home, instance) == []
    instance.report_run_failed(run, "killed")
    assert len(look(home, instance)) == 1


# -- alerts -------------------------------------------------------------------------------


class Kaput(Exception):
    pass


@dg.op
def breaks() -> None:
    raise Kaput("hf_s3cret was not accepted: „naïve“")


@dg.job
def broken() -> None:
    breaks()


def failed_context() -> tuple[dg.DagsterInstance, dg.RunFailureSensorContext]:
    instance = dg.DagsterInstance.ephemeral()
    result = broken.execute_in_process(
        instance=instance, raise_on_error=False, tags={"dagster/partition": "sample|tiny"}
    )
    context = dg.build_run_status_sensor_context(
        sensor_name="alert_webhook",
        dagster_instance=instance,
        dagster_run=result.dagster_run,
        dagster_event=result.get_run_failure_event(),
    ).for_run_failure()
    return instance, context


def test_alerts_are_off_without_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (alerts.WEBHOOK, *alerts.EMAIL):
        monkeypatch.delenv(name, raising=False)
    assert alert_webhook.default_status == dg.DefaultSensorStatus.STOPPED
    assert email_sensor() == []
    _, context = failed_context()
    skipped = alert_webhook(context)
    assert isinstance(skipped, dg.SkipReason)
    assert "is not set" in str(skipped.skip_message)


def test_a_failed_run_is_posted_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    posted = []
    monkeypatch.setenv(alerts.WEBHOOK, "https://example.org/T0p")
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    monkeypatch.setattr(alerts, "post", lambda url, alert: posted.append((url, alert)))
    _, context = failed_context()
    assert alert_webhook(context) is None
    ((url, alert),) = posted
    assert url == "https://example.org/T0p"
    assert (alert["job"], alert["partition"]) == ("broken", "sample|tiny")
    assert alert["run_id"] == context.dagster_run.run_id
    assert alert["text"].startswith("llmrec_assets: broken sample|tiny failed (run ")
    assert "step breaks:" in alert["text"]
    assert "<HF_TOKEN> was not accepted: „naïve“" in alert["text"]
    assert "s3cret" not in str(alert)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/T0p", "http://example.org/T0p"])
def test_a_failing_webhook_is_a_skipped_tick_that_does_not_name_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(alerts.WEBHOOK, url)
    _, context = failed_context()
    skipped = alert_webhook(context)
    assert isinstance(skipped, dg.SkipReason)
    assert "T0p" not in str(skipped.skip_message)


def test_e_mail_goes_through_dagsters_own_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster._utils import alert

    sent: list[tuple] = []
    monkeypatch.setattr(alert, "send_email_via_starttls", lambda *a, **k: sent.append((a, k)))
    for name, value in zip(
        alerts.EMAIL,
        ("mail.example.org:587", "llmrec@example.org", "a@example.org, b@example.org", "pw"),
        strict=True,
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    (sensor,) = email_sensor()
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
    _, context = failed_context()
    sensor(context)
    ((arguments, options),) = sent
    assert arguments[:3] == ("llmrec@example.org", "pw", ["a@example.org", "b@example.org"])
    assert arguments[4] == "mail.example.org"
    assert options["smtp_port"] == 587
    message = arguments[3]
    message.encode("ascii")
    assert "Dagster Run Failed: broken" in message
    assert "&lt;HF_TOKEN&gt; was not accepted" in message and "s3cret" not in message
