"""A teacher that runs once: its maps and logits in the first epochs are kept, and read later."""

from __future__ import annotations

from trainer.teacher_cache.cache import TeacherCache

__all__ = ["TeacherCache"]
