"""From a row of a prompt file to what is asked of a model."""

from __future__ import annotations

from flowrl.config.schema import Config
from flowrl.records import PromptRow, Request


def request_of(config: Config, row: PromptRow) -> Request:
    """What a prompt asks of this run's model; a row's own "negative" is what guidance leads away from."""
    model = config.model
    negative = str(row.metadata.get("negative", ""))
    return Request(row.prompt, row.prompt_id, model.height, model.width, model.frames, negative, row.metadata)
