"""Draw the mascot, a fox: python -m assets.fox writes assets/fox.svg.

Half a face of plain shapes, mirrored. The background is transparent, for light and dark pages.
"""

from pathlib import Path

from src.utils.errors import exit_with, print_result

FOX = Path(__file__).with_name("fox.svg")
WIDTH, HEIGHT = 320, 300

ORANGE, DARK_ORANGE, CREAM, INK, ROSE = "#e8702a", "#c9531a", "#fde8cd", "#2b2523", "#f4b58c"

# The left half, from back to front: fill and path. The middle is x = 160.
HALF = (
    (DARK_ORANGE, "M 34 20 C 26 66 30 118 58 150 L 146 84 C 112 48 74 26 34 20 Z"),  # ear
    (INK, "M 34 20 C 31 40 31 58 34 76 L 70 40 C 58 32 46 24 34 20 Z"),  # tip of the ear
    (ROSE, "M 58 66 C 56 92 60 114 70 130 L 112 92 C 96 80 78 70 58 66 Z"),  # inside of the ear
    (ORANGE, "M 162 74 C 108 74 66 100 46 140 C 30 172 26 190 14 208 C 64 206 98 236 162 268 Z"),  # face
    (
        CREAM,
        "M 12 210 C 58 190 104 196 128 186 C 142 210 148 228 162 236 L 162 287 L 160 288 C 92 250 60 214 12 210 Z",
    ),
    (DARK_ORANGE, "M 162 74 C 150 74 144 76 138 78 C 146 96 152 118 162 140 Z"),  # stripe on the forehead
    (INK, "M 84 164 C 94 148 118 146 130 164 C 118 176 96 178 84 164 Z"),  # eye
    (CREAM, "M 108 156 a 5 5 0 1 0 0.1 0 Z"),  # highlight in the eye
    (INK, "M 162 248 C 146 248 134 240 134 230 C 134 222 146 218 162 218 Z"),  # nose
)


def fox() -> str:
    """Return the picture as SVG."""
    half = "\n".join(f'<path fill="{fill}" d="{path}"/>' for fill, path in HALF)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="A fox">\n'
        f'<g id="half">\n{half}\n</g>\n<use href="#half" transform="matrix(-1 0 0 1 {WIDTH} 0)"/>\n</svg>\n'
    )


def main() -> None:
    FOX.write_text(fox(), encoding="utf-8")
    print_result({"picture": str(FOX)}, f"wrote {FOX}")


if __name__ == "__main__":
    exit_with(main)
