"""What a client puts together from the frames of a stream."""

import json
from typing import Any

from agent.events import Cursor, Frame


class Reader:
    """What a client of the stream has put together."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self.parts: dict[str, str] = {}
        self.cursor = Cursor()
        self.gaps: list[Frame] = []

    def take(self, frame: Frame) -> None:
        body = json.loads(frame.data)
        if frame.event in {"text_delta", "tool_output_delta"}:
            part = body.get("part_id") or body["tool_call_id"]
            have = self.parts.get(part, "")
            if body["offset"] > len(have):
                self.gaps.append(frame)
            self.parts[part] = have[: body["offset"]] + body["text"]
        else:
            assert frame.event == body["type"]
            self.facts.append(body)

    def types(self) -> list[str]:
        return [fact["type"] for fact in self.facts]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fact for fact in self.facts if fact["type"] == kind]
