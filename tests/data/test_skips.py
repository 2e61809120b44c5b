"""What was left out is counted once, and counts of ranks and of runs are put together."""

import json

from vlmfast.data.skips import Skipped, UnreadableError


def test_states_of_two_ranks_make_one_count():
    ours, theirs = Skipped(), Skipped()
    assert ours.add(3, UnreadableError("not an image", "b.jpg"))
    assert not ours.add(3, UnreadableError("not an image", "b.jpg"))
    ours.add("0.tar", UnreadableError("tar cut short", "0.tar"))
    theirs.add(3, UnreadableError("not an image", "b.jpg"))
    theirs.add(9, UnreadableError("not an image", "a.jpg"))
    theirs.add(4, UnreadableError("empty file", "c.jpg"))
    ours.load_state_dict(json.loads(json.dumps(theirs.state_dict())))
    assert ours.counts() == {"not an image": 2, "tar cut short": 1, "empty file": 1}
    assert ours.describe().startswith("skipped 4: 2 not an image, such as a.jpg: not an image")
    assert not ours.add(4, UnreadableError("empty file", "c.jpg"))
    assert Skipped().describe() == ""
