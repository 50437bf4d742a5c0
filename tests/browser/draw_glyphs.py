"""Draw the letters of the saved picture anew: `python tests/browser/draw_glyphs.py`.

Writes py/expert_lens/widgets/static/glyphs.npz: for "regular" and "bold", alpha u8 [characters, height, width] with the
pen at 2 pixels from the left, advances f32 [characters]; and the characters' code points, u32. Needs Chromium and the
font Liberation Sans.
"""

import unicodedata
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from laboratory import CHROMIUM_FLAGS, find_chromium

GLYPHS = Path(__file__).parents[2] / "py" / "expert_lens" / "widgets" / "static" / "glyphs.npz"
LATIN = [code for code in range(32, 256) if unicodedata.category(chr(code)) != "Cc"]
SIGNS = [0x2265, 0x2264, 0x2013, 0x2014, 0x2026, 0x2212, 0x201C, 0x201D, 0x2018, 0x2019, 0x2022, 0x2192]
"""At most, at least; dashes, ellipsis, minus; quotation marks; bullet, arrow."""
CHARACTERS = LATIN + SIGNS
FONTS = {"regular": ("21px", 26, 28, 21), "bold": ("bold 27px", 31, 36, 27)}
"""Font, width and height of a letter's cell, and the baseline in it."""

DRAW = """([codes, font, width, height, baseline]) => {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.font = `${font} "Liberation Sans"`;
    return codes.map(code => {
        const text = String.fromCodePoint(code);
        context.clearRect(0, 0, width, height);
        context.fillText(text, 2, baseline);
        const alpha = [...context.getImageData(0, 0, width, height).data].filter((_, index) => index % 4 === 3);
        return [context.measureText(text).width, alpha];
    });
}"""


def main() -> None:
    table = {"characters": np.array(CHARACTERS, np.uint32)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        page = browser.new_page()
        for name, (font, width, height, baseline) in FONTS.items():
            drawn = page.evaluate(DRAW, [CHARACTERS, font, width, height, baseline])
            table[name] = np.array([alpha for _, alpha in drawn], np.uint8).reshape(-1, height, width)
            table[f"{name}_advance"] = np.array([advance for advance, _ in drawn], np.float32)
        browser.close()
    np.savez_compressed(GLYPHS, **table)


if __name__ == "__main__":
    main()
