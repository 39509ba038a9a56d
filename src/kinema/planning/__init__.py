"""From a Request to a Plan: every decision, made and checked before a weight is loaded. No torch."""

from kinema.planning.checks import MEDIA_FIELDS, check_request
from kinema.planning.outputs import output_folder, plan_output, sidecars
from kinema.planning.plan import make_plan

__all__ = ["MEDIA_FIELDS", "check_request", "make_plan", "output_folder", "plan_output", "sidecars"]
