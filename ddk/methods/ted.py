"""ted: as kd, and the student's layers imitate the teacher's through task-aware filters.

The layer term and its filters are in `ddk.ted.student`; this module only declares that the method needs the live
teacher.
"""

from __future__ import annotations

from ddk.methods.base import Method
from ddk.methods.fixed import fixed

TED = Method(next_mixture=fixed("proportional"), follows_gap=False, needs_teacher=True)
