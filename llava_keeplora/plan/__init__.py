"""What a run will need, before it starts: memory, disk and steps."""

from llava_keeplora.plan.machine import Machine, check_start, find_machine
from llava_keeplora.plan.plan import MethodPlan, Plan, StagePlan, make_plan
from llava_keeplora.plan.table import changes_text, describe, refusal

__all__ = ["Machine", "MethodPlan", "Plan", "StagePlan", "changes_text", "check_start", "describe", "find_machine", "make_plan", "refusal"]
