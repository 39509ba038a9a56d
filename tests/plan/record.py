"""Write fixtures.json anew: python tests/plan/record.py; then read the difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plan.test_plan import CASES, FIXTURES, summary
from plan.world import plan

if __name__ == "__main__":
    recorded = {model: summary(plan(model, **case)) for model, case in CASES.items()}
    FIXTURES.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", "utf-8")
