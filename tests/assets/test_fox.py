"""The mascot in the repository is what its script draws."""

from assets.fox import FOX, fox


def test_it_is_what_the_script_draws():
    assert FOX.read_text(encoding="utf-8") == fox()
