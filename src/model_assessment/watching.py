"""How a run is watched while it goes on: its page, and the other programs that it reports to."""

from collections.abc import Iterable
from typing import Any

from src.model_assessment.live_report import LiveReport
from src.model_assessment.trackers import Sinks
from src.utils.logger import RunLogger


class Watching:
    """From its making until `close`, records that `log` writes go to those in `report_to` too.

    `settings`: what the run's config.json says. Does nothing but in the main process.
    """

    def __init__(self, log: RunLogger, report_to: Iterable[str], run_name: str, settings: dict[str, Any]) -> None:
        self._sinks: Sinks | None = None
        if log.is_main:
            self._page = LiveReport(log.run_dir, log.info)
            self._sinks = Sinks(log.run_dir, log.info)
            self._sinks.open(report_to, run_name, settings, log.records())
            log.listeners.append(self._sinks.write)

    def refresh(self) -> None:
        """Starts to write report.html anew if it is time; does not wait for it."""
        if self._sinks:
            self._page.refresh()

    def close(self) -> None:
        """Hands on what is left; a report.html that is there says from now on how the run ended. Again: nothing."""
        if self._sinks:
            self._sinks.close()
            self._page.close()
            self._sinks = None
