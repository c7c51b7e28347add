"""An independent reader of Emoji World's clips: answers from which things are where, frame by frame."""

from collections.abc import Hashable, Sequence

from dataset.emoji_world import Thing


class Reader:
    """frames: the things of each, from left to right."""

    def __init__(self, frames: Sequence[Sequence[Thing]]):
        self.frames = [{thing.concept: thing for thing in frame} for frame in frames]
        self.events = []  # (comes or leaves, concept) in order; a thing may come again where frames are shuffled
        for before, after in zip(self.frames, self.frames[1:], strict=False):
            self.events += [(True, concept) for concept in after if concept not in before]
            self.events += [(False, concept) for concept in before if concept not in after]

    def answer(self, kind: str, about: Hashable) -> Hashable:
        """None also where there is no answer."""
        came, left = ([concept for comes, concept in self.events if comes is which] for which in (True, False))
        if kind == "count":
            return len(set(came if about == "in" else left))
        if kind in ("in", "out"):
            happened = came if kind == "in" else left
            return happened[0 if about == "first" else -1] if happened else None
        if kind == "after":
            order, concept = about
            place = came.index(concept) + (1 if order == "after" else -1) if concept in came else -1
            return came[place] if 0 <= place < len(came) else None
        if kind == "ends":
            return tuple(self.frames[0 if about == "start" else -1]) or None
        if kind == "story":
            return tuple(self.frames[0]), tuple(self.events)
        return self._way(about)

    def _way(self, concept: Hashable) -> int:
        seen = [frame[concept] for frame in self.frames if concept in frame]
        across, down = seen[-1].x - seen[0].x, seen[-1].y - seen[0].y
        return (1 if across > 0 else 0) if abs(across) > abs(down) else (3 if down > 0 else 2)
