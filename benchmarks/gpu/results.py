"""`FOLDER/results.jsonl`: what has been found so far, a line at a time, so that a killed run keeps all but one."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """Records in the order in which they came. Of several about the same thing the last one counts.

    A record's ``kind`` is "call" (of the script), "machine", "begun" (a case), "case" or "step". A case with an
    ``error`` gave no result; one whose ``ok`` is false gave a wrong one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "results.jsonl"
        self._lock = threading.Lock()

    def append(self, kind: str, **values: object) -> None:
        line = json.dumps({"kind": kind, **values}) + "\n"
        with self._lock:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                end = os.lseek(file, 0, os.SEEK_END)
                torn = end and os.pread(file, 1, end - 1) != b"\n"  # by a machine that went away
                os.write(file, (b"\n" if torn else b"") + line.encode())
            finally:
                os.close(file)

    def records(self, kind: str) -> list[Record]:
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn
            if record["kind"] == kind:
                found.append(record)
        return found

    def steps(self) -> dict[str, Record]:
        """How each step ended, by its name."""
        return {r["step"]: r for r in self.records("step")}

    def cases(self, step: str) -> dict[str, Record]:
        """What each case of a step gave, by its name."""
        return {r["case"]: r for r in self.records("case") if r["step"] == step}

    def open_case(self, step: str, call: int) -> str | None:
        """The case that a step had begun in this call when it ended, None if it had none."""
        begun = [r["case"] for r in self.records("begun") if (r["step"], r["call"]) == (step, call)]
        case = self.cases(step).get(begun[-1]) if begun else None
        return begun[-1] if begun and (case is None or case["call"] != call) else None

    def failures(self, step: str) -> list[str]:
        """Cases of a step without a result, or with a wrong one, each with what is the matter."""
        return [
            f"{name}: {case.get('error') or case.get('wrong') or 'wrong'}"
            for name, case in self.cases(step).items()
            if "error" in case or case.get("ok") is False
        ]
