"""Pictures of the project, and the scripts that draw them."""


def dark(svg: str) -> str:
    """Return a picture for a dark page: inverted, but with the same hues, like in a report."""
    return svg.replace("<svg ", '<svg style="filter:invert(0.9) hue-rotate(180deg)" ', 1)
