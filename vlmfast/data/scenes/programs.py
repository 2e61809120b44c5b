"""Programs of questions about scenes, and the interpreter that answers them from the scene alone.

A program is nested tuples (or lists, as JSON gives them back):

    set of objects   ("all",)  ("filter", attribute, value, set)  ("beside", relation, set of one)
    answer           ("exist", set)  ("count", set)  ("query", attribute, set of one)
                     ("bigger" | "smaller", one, one)  ("more" | "fewer", set, set)
                     ("relates", relation, one, one)  ("same" | "different", attribute, one, one)
                     ("and" | "or", answer, answer)  ("not", answer)

An attribute is shape, colour, size, texture or place; a relation is left of, right of, above or below. ("beside",
"left of", s) is what lies left of s. The interpreter shares no code with what makes the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmfast.data.scenes.latents import APART, SIZES, UNIT, Object, Scene
from vlmfast.errors import DataError

Program = Sequence[Any]
CLEAR = (APART - 0.5) / UNIT  # how far apart centres are whose relation is asked, as a part of the image's side


def execute(program: Program, scene: Scene) -> str:
    """The answer of a program about a scene: yes, no, a number in digits, or the value of an attribute.

    Args:
        program: as the module says.
        scene: what it is asked about.

    Raises:
        DataError: it is no program, the scene has none or several of what should be one, or the answer would turn on
            two centres that are nearly level with each other.
    """
    strict, loose = (_answer(program, scene, gap) for gap in (CLEAR, -CLEAR))
    if strict != loose:
        raise DataError(f"scenes: {program} is too close to call in scene {scene.index} of {scene.level}/{scene.split}")
    return strict


def _answer(program: Program, scene: Scene, gap: float) -> str:
    match program:
        case ["count", some]:
            return str(len(_some(some, scene, gap)))
        case ["query", attribute, one]:
            return str(getattr(_one(one, scene, gap), attribute))
        case _:
            return "yes" if _holds(program, scene, gap) else "no"


def _holds(program: Program, scene: Scene, gap: float) -> bool:
    match program:
        case ["exist", some]:
            return bool(_some(some, scene, gap))
        case ["more" | "fewer" as which, a, b]:
            more, fewer = len(_some(a, scene, gap)), len(_some(b, scene, gap))
            return more > fewer if which == "more" else more < fewer
        case ["bigger" | "smaller" as which, a, b]:
            one, other = (SIZES.index(str(_one(each, scene, gap).size)) for each in (a, b))
            return one > other if which == "bigger" else one < other
        case ["relates", relation, a, b]:
            return _lies(_one(a, scene, gap), relation, _one(b, scene, gap), gap)
        case ["same" | "different" as which, attribute, a, b]:
            one, other = (getattr(_one(each, scene, gap), attribute) for each in (a, b))
            return (one == other) == (which == "same")
        case ["and", p, q]:
            return _holds(p, scene, gap) and _holds(q, scene, gap)
        case ["or", p, q]:
            return _holds(p, scene, gap) or _holds(q, scene, gap)
        case ["not", p]:
            return not _holds(p, scene, gap)
    raise DataError(f"scenes: {program!r} is no program; vlmfast.data.scenes.programs lists them")


def _some(program: Program, scene: Scene, gap: float) -> list[Object]:
    match program:
        case ["all"]:
            return list(scene.objects)
        case ["filter", attribute, value, inner]:
            return [thing for thing in _some(inner, scene, gap) if getattr(thing, attribute) == value]
        case ["beside", relation, inner]:
            one = _one(inner, scene, gap)
            return [thing for thing in scene.objects if thing.id != one.id and _lies(thing, relation, one, gap)]
    raise DataError(f"scenes: {program!r} is no set of objects; vlmfast.data.scenes.programs lists them")


def _one(program: Program, scene: Scene, gap: float) -> Object:
    things = _some(program, scene, gap)
    if len(things) != 1:
        where = f"scene {scene.index} of {scene.level}/{scene.split}"
        raise DataError(f"scenes: {program} should be one object; {where} has {len(things)}")
    return things[0]


def _lies(a: Object, relation: str, b: Object, gap: float) -> bool:
    match relation:
        case "left of":
            return b.x - a.x >= gap
        case "right of":
            return a.x - b.x >= gap
        case "above":
            return b.y - a.y >= gap
        case "below":
            return a.y - b.y >= gap
    raise DataError(f"scenes: {relation!r} is no relation; there are left of, right of, above and below")
