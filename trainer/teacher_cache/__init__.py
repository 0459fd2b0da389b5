"""A teacher that runs once: what it makes of the images in the first epochs is kept, and read later."""

from __future__ import annotations

from trainer.teacher_cache.cache import TeacherCache

__all__ = ["TeacherCache"]
