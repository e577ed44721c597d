"""Failure alerts: a webhook or an e-mail when a run fails, off without their environment.

What belongs here: what an alert says, and the sensors. What does not: sending (``ground.alerts``,
Dagster's own e-mail sensor).
"""

import html
import os

import dagster as dg

from llmrec_assets.ground import alerts
from llmrec_assets.ground.errors import LlmrecError
from llmrec_assets.ground.redaction import without_secrets

_LONGEST = 1000


def _status(is_on: bool) -> dg.DefaultSensorStatus:
    return dg.DefaultSensorStatus.RUNNING if is_on else dg.DefaultSensorStatus.STOPPED


@dg.run_failure_sensor(
    monitor_all_code_locations=False,
    default_status=_status(bool(os.environ.get(alerts.WEBHOOK))),
    description=f"Posts every failed run as JSON to the URL in {alerts.WEBHOOK}; without it "
    "nothing is sent.",
)
def alert_webhook(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
    """Posts what failed. A webhook that fails is a warning in the tick's log."""
    try:
        url = alerts.webhook()
    except LlmrecError as error:
        return dg.SkipReason(str(error))
    if url is None:
        return dg.SkipReason(f"{alerts.WEBHOOK} is not set")
    run = context.dagster_run
    problem = alerts.post(
        url,
        {
            "text": failure_text(context),
            "job": run.job_name,
            "partition": run.tags.get("dagster/partition", ""),
            "run_id": run.run_id,
        },
    )
    if problem is not None:
        context.log.warning(problem)
        return dg.SkipReason(problem)
    return None


def failure_text(context: dg.RunFailureSensorContext) -> str:
    """Job, partition, run, and the message of the first step that failed."""
    run = context.dagster_run
    partition = run.tags.get("dagster/partition")
    what = f"{run.job_name} {partition}" if partition else run.job_name
    steps = context.get_step_failure_events()
    message = context.failure_event.message or "no message"
    if steps:
        error = getattr(steps[0].event_specific_data, "error", None)
        # Dagster wraps the exception that the asset raised; its cause says what happened.
        while error is not None and error.cause is not None:
            error = error.cause
        message = f"step {steps[0].step_key}: {(error and error.message) or steps[0].message}"
    text = f"llmrec_assets: {what} failed (run {run.run_id})\n{message.strip()}"
    return without_secrets(text)[:_LONGEST]


def _as_html(context: dg.RunFailureSensorContext) -> str:
    """Dagster sends the body as ASCII HTML."""
    shown = html.escape(failure_text(context)).replace("\n", "<br>")
    return shown.encode("ascii", "xmlcharrefreplace").decode()


def email_sensor() -> list[dg.SensorDefinition]:
    """Dagster's e-mail sensor when all of ``ground.alerts.EMAIL`` is set, or nothing."""
    server, sender, recipients, password = (
        os.environ.get(name, "").strip() for name in alerts.EMAIL
    )
    if not (server and sender and recipients and password):
        return []
    host, _, port = server.partition(":")
    return [
        dg.make_email_on_run_failure_sensor(
            name="alert_email",
            email_from=sender,
            email_password=password,
            email_to=[address.strip() for address in recipients.split(",")],
            smtp_host=host,
            smtp_type="STARTTLS" if port == "587" else "SSL",
            smtp_port=int(port) if port.isdigit() else None,
            email_body_fn=_as_html,
            default_status=dg.DefaultSensorStatus.RUNNING,
        )
    ]
