"""The tars of emoji: pictures of a font, captions as people write them, and combinations that training never sees."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import BitmapSizeTable, SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image

from rdm_scale.encoding.inputs import find_media
from rdm_scale.storage.location import Location
from rdm_scale.tools import make_emoji
from rdm_scale.tools._emoji_captions import caption
from rdm_scale.tools._emoji_font import FONT, read_font
from rdm_scale.tools._emoji_names import NAMES, Combination, NamedEmoji, combinations, hold_out, read_names

ROLES = {"cook": "1F373", "farmer": "1F33E", "judge": "2696 FE0F", "pilot": "2708 FE0F", "singer": "1F3A4"}
PERSONS = {"": "1F9D1", "man ": "1F468", "woman ": "1F469"}
TONES = {
    "": "",
    "light": " 1F3FB",
    "medium-light": " 1F3FC",
    "medium": " 1F3FD",
    "medium-dark": " 1F3FE",
    "dark": " 1F3FF",
}


def names_text() -> str:
    """Text in the form of emoji-test.txt: a face, and 5 roles x 3 persons x 6 skin tones."""
    lines = ["# emoji-test.txt", "# © 2022 Unicode®, Inc.", "# group: Smileys & Emotion", "# subgroup: face-smiling"]
    lines += ["1F600 ; fully-qualified # 😀 E1.0 grinning face", "263A ; unqualified # ☺ E0.6 smiling face"]
    lines += ["# group: People & Body", "# subgroup: person-role"]
    for role, sign in ROLES.items():
        for person, code in PERSONS.items():
            for tone, modifier in TONES.items():
                name = f"{person}{role}" + (f": {tone} skin tone" if tone else "")
                lines.append(f"{code}{modifier} 200D {sign} ; fully-qualified # x E4.0 {name}")
    return "\n".join(lines)


def color(index: int) -> tuple[int, int, int, int]:
    return (index * 2, 255 - index, 40, 255)


def bitmap(index: int) -> bytes:
    """A PNG of 34 x 32 pixels: the left half in a color of its own, the right half transparent black."""
    picture = Image.new("RGBA", (34, 32), (0, 0, 0, 0))
    picture.paste(color(index), (0, 0, 17, 32))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def build_font(path: Path, emoji: list[NamedEmoji]) -> None:
    """A font with CBDT bitmaps, one for each emoji, and ligatures for those of several characters."""
    codes = sorted({ord(c) for one in emoji for c in one.characters} - {0xFE0F})
    glyphs = {code: f"u{code:04X}" for code in codes}
    rules, pictures = [], {}
    for index, one in enumerate(emoji):
        parts = [glyphs[ord(c)] for c in one.characters if c != "\ufe0f"]
        name = parts[0] if len(parts) == 1 else f"lig{index}"
        if len(parts) > 1:
            rules.append(f"sub {' '.join(parts)} by {name};")
        pictures[name] = bitmap(index)
    builder = FontBuilder(1024, isTTF=True)
    order = [".notdef", *glyphs.values(), *(name for name in pictures if name.startswith("lig"))]
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1024, 0)))
    builder.setupNameTable({"familyName": "Tiny", "fullName": "Tiny Emoji", "copyright": "Copyright Nobody"})
    font = builder.font
    addOpenTypeFeaturesFromString(font, f"feature ccmp {{ {' '.join(rules)} }} ccmp;")
    add_bitmaps(font, {name: pictures[name] for name in order if name in pictures})
    font.save(path)


def add_bitmaps(font, pictures: dict[str, bytes]) -> None:
    line = SbitLineMetrics()
    for field in (
        *("ascender", "descender", "widthMax", "caretSlopeNumerator", "caretSlopeDenominator", "caretOffset"),
        *("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL", "pad1", "pad2"),
    ):
        setattr(line, field, 0)
    strike = Strike()
    strike.bitmapSizeTable = BitmapSizeTable()
    strike.bitmapSizeTable.hori = strike.bitmapSizeTable.vert = line
    for field, value in {"colorRef": 0, "ppemX": 32, "ppemY": 32, "bitDepth": 32, "flags": 1}.items():
        setattr(strike.bitmapSizeTable, field, value)
    index = eblc_index_sub_table_1(b"", font)
    index.indexFormat, index.imageFormat, index.names = 1, 17, list(pictures)
    strike.indexSubTables = [index]
    glyphs = {}
    for name, content in pictures.items():
        glyph = glyphs[name] = cbdt_bitmap_format_17(b"", font)
        glyph.metrics, glyph.imageData = SmallGlyphMetrics(), content
        for field, value in {"height": 32, "width": 34, "BearingX": 0, "BearingY": 32, "Advance": 34}.items():
            setattr(glyph.metrics, field, value)
    font["CBDT"], font["CBLC"] = newTable("CBDT"), newTable("CBLC")
    font["CBDT"].version = font["CBLC"].version = 3.0
    font["CBDT"].strikeData, font["CBLC"].strikes = [glyphs], [strike]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with names.txt, and font.ttf with all of its emoji."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "names.txt").write_text(names_text(), "utf-8")
    build_font(folder / "font.ttf", read_names(folder / "names.txt"))
    return folder


def make(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_emoji", *map(str, arguments)])
    return make_emoji.main()


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def test_the_tars(tiny, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        output = tmp_path / name / "emoji.tar"
        assert make(monkeypatch, output, "--font", tiny / "font.ttf", "--names", tiny / "names.txt", "--size", 17) == 0
    assert f"wrote {output}: 73 emoji" in capsys.readouterr().out
    for name in ("emoji.tar", "emoji-holdout.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    train, held = members(output), members(output.with_name("emoji-holdout.tar"))
    assert train.keys() & held.keys() == {"LICENSE"}
    assert len(train) == 1 + 3 * 73 and len(held) == 1 + 3 * 18  # a fifth of 90 combinations
    for side in (train, held):
        notice = side["LICENSE"].decode()
        for part in ("Tiny Emoji\nCopyright Nobody", "17 x 17", "© 2022 Unicode®", "SIL OPEN FONT LICENSE Version 1.1"):
            assert part in notice

    names = read_names(tiny / "names.txt")
    assert [one.characters for one in names[:2]] == ["😀", "🧑‍🍳"] and len(names) == 91
    everything = train | held
    for side in (train, held):  # in the order of the names
        assert [key for key in side if key.endswith(".png")] == [
            f"{n.key}.png" for n in names if f"{n.key}.png" in side
        ]
    for index, one in enumerate(names):
        picture = Image.open(io.BytesIO(everything[f"{one.key}.png"]))
        assert picture.size == (17, 17) and picture.mode == "RGB"
        assert picture.getpixel((4, 8)) == color(index)[:3] and picture.getpixel((13, 8)) == (255, 255, 255)

    key = "1f469-1f3fd-200d-2696-fe0f"
    assert everything[f"{key}.txt"].decode() == "a woman judge with medium skin tone"
    assert json.loads(everything[f"{key}.json"]) == {
        "emoji": "👩🏽‍⚖️",
        "name": "woman judge: medium skin tone",
        "group": "People & Body",
        "subgroup": "person-role",
        "role": "judge",
        "person": "woman",
        "skin_tone": "medium",
    }
    assert "role" not in json.loads(everything["1f600.json"])

    media = find_media(Location(str(output)))  # as encode_latents reads it
    assert {file.key: file.caption for file in media.files}["1f600"] == "a grinning face"
    assert len(media.files) == 73


def test_what_is_held_out():
    names = {"person": "", "man": "man ", "woman": "woman "}
    tones = [tone or "default" for tone in TONES]
    known = {f"{r}/{p}/{t}": Combination(r, p, t) for r in ROLES for p in names for t in tones}
    pictures = {key: key.encode() for key in known}
    held = hold_out(known, pictures)
    assert len(held) == 18 and held == hold_out(dict(reversed(known.items())), pictures)
    shared = sorted(held)[::6]
    assert not hold_out(known, pictures | dict.fromkeys(shared, b"shared")) & set(shared)
    kept = [known[key] for key in known.keys() - held]
    for key in held:
        role, person, tone = known[key]
        assert any(one[:2] == (role, person) for one in kept)
        assert any(one[1:] == (person, tone) for one in kept)
        assert any((one.role, one.skin_tone) == (role, tone) for one in kept)
    per_role = np.bincount([list(ROLES).index(known[key].role) for key in held], minlength=5)
    assert per_role.max() <= 4  # a fifth of 18, rounded up


def test_a_pair_of_attributes_is_never_held_out_whole():
    known = {f"{p}/{t}": Combination("dancing", p, t) for p in ("man", "woman") for t in ("light", "dark")}
    for _ in range(20):
        known |= {f"{len(known)}": Combination(f"role {len(known)}", "man", "light")}  # the only one of its pairs
    assert hold_out(known, {key: key.encode() for key in known}) <= {
        "man/light",
        "man/dark",
        "woman/light",
        "woman/dark",
    }


def test_attributes():
    rows = ["man: beard", "woman: dark skin tone, beard", "merman", "mermaid: light skin tone", "old man", "old woman"]
    rows += ["older person: dark skin tone", "pregnant man", "pregnant woman: dark skin tone", "man", "ninja", "prince"]
    rows += ["man dancing", "woman dancing: medium skin tone", "ninja: dark skin tone", "genie", "man genie"]
    rows += [
        "man dancing: light skin tone, dark skin tone",
        "handshake: light skin tone, dark skin tone",
        "man cook",
        "woman cook",
        "cook: light skin tone",
    ]
    people = [NamedEmoji(chr(0x1F000 + i), name, "People & Body") for i, name in enumerate(rows)]
    found = combinations([*people, NamedEmoji("x", "man cook", "Objects")])
    assert {one.name: tuple(found[one.key]) for one in people if one.key in found} == {
        "man: beard": ("beard", "man", "default"),
        "woman: dark skin tone, beard": ("beard", "woman", "dark"),
        "merman": ("merfolk", "man", "default"),
        "mermaid: light skin tone": ("merfolk", "woman", "light"),
        "old man": ("old", "man", "default"),
        "old woman": ("old", "woman", "default"),
        "older person: dark skin tone": ("old", "person", "dark"),
        "pregnant man": ("pregnant", "man", "default"),
        "pregnant woman: dark skin tone": ("pregnant", "woman", "dark"),
        "man dancing": ("dancing", "man", "default"),
        "woman dancing: medium skin tone": ("dancing", "woman", "medium"),
        "man cook": ("cook", "man", "default"),
        "woman cook": ("cook", "woman", "default"),
        "cook: light skin tone": ("cook", "person", "light"),
    }
    assert len(found) == 14


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("woman firefighter: medium skin tone", "a woman firefighter with medium skin tone"),
        ("artist: dark skin tone", "an artist with dark skin tone"),
        ("man: medium-dark skin tone, red hair", "a man with medium-dark skin tone and red hair"),
        ("woman: light skin tone, bald", "a bald woman with light skin tone"),
        ("person: beard", "a person with a beard"),
        ("man with veil: light skin tone", "a man with a veil and light skin tone"),
        ("person in bed", "a person in bed"),
        ("woman wearing turban: dark skin tone", "a woman wearing a turban with dark skin tone"),
        ("handshake: light skin tone, dark skin tone", "a handshake with light and dark skin tones"),
        ("men holding hands: light skin tone", "men holding hands with light skin tone"),
        ("people hugging", "people hugging"),
        ("kiss: man, man, light skin tone, dark skin tone", "a kiss between two men with light and dark skin tones"),
        ("kiss", "a kiss between two people"),
        ("couple with heart: woman, man", "a couple with a heart, a woman and a man"),
        ("family", "a family"),
        ("family: man, woman, girl, boy", "a family of a man, a woman, a girl and a boy"),
        ("family: woman, girl, girl", "a family of a woman and two girls"),
        ("flag: Kenya", "the flag of Kenya"),
        ("flag: United States", "the flag of the United States"),
        ("flag: Trinidad & Tobago", "the flag of Trinidad and Tobago"),
        ("flag: Cook Islands", "the flag of the Cook Islands"),
        ("chequered flag", "a chequered flag"),
        ("keycap: 7", "a keycap with the number 7"),
        ("keycap: #", "a keycap with the sign #"),
        ("Santa Claus: dark skin tone", "Santa Claus with dark skin tone"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella with rain drops", "an umbrella with rain drops"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("compass", "a compass"),
        ("cooked rice", "cooked rice"),
        ("face holding back tears", "a face holding back tears"),
        ("thumbs up: dark skin tone", "thumbs up with dark skin tone"),
        ("leftwards pushing hand", "a leftwards pushing hand"),
    ],
)
def test_captions(name, expected):
    assert caption(NamedEmoji("x", name)) == expected


def test_captions_that_depend_on_the_group():
    assert caption(NamedEmoji("x", "one-thirty", "Travel & Places", "time")) == "a clock at one-thirty"
    assert caption(NamedEmoji("x", "no smoking", "Symbols", "warning")) == "the no smoking symbol"
    assert caption(NamedEmoji("x", "OK button", "Symbols", "alphanum")) == "an OK button"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("font.ttf", None, "no emoji font at {}: apt-get install fonts-noto-color-emoji, or --font PATH"),
        ("font.ttf", "text", "the font {} cannot be read (Not a TrueType or OpenType font"),
        ("font.ttf", "plain", "the font {} has no color bitmaps (no table CBDT)"),
        ("font.ttf", "other", "the font {} has none of the 91 emoji"),
        ("names.txt", None, "no names of emoji at {}: apt-get install unicode-data, or --names PATH"),
        ("names.txt", "text", "{} names no fully-qualified emoji"),
    ],
)
def test_refusals(tiny, tmp_path, monkeypatch, capsys, file, content, message):
    paths = {"font.ttf": tiny / "font.ttf", "names.txt": tiny / "names.txt"}
    paths[file] = tmp_path / file
    if content == "text":
        paths[file].write_text("nothing of the kind")
    elif content == "plain":
        builder = FontBuilder(1024)
        builder.setupGlyphOrder([".notdef"])
        builder.setupCharacterMap({})
        builder.font.save(paths[file])
    elif content == "other":
        build_font(paths[file], [NamedEmoji("🦀🦞", "crabs")])
    output = tmp_path / "out" / "emoji.tar"
    assert make(monkeypatch, output, "--font", paths["font.ttf"], "--names", paths["names.txt"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"make_emoji: error: {message.format(paths[file])}") and said.count("\n") == 1
    assert not output.parent.exists()


def test_emoji_that_the_font_lacks_are_named(tiny, tmp_path, monkeypatch, capsys):
    build_font(tmp_path / "font.ttf", read_names(tiny / "names.txt")[1:])
    arguments = ("--font", tmp_path / "font.ttf", "--names", tiny / "names.txt", "--holdout", tmp_path / "b.tar")
    assert make(monkeypatch, tmp_path / "a.tar", *arguments) == 0
    assert "note: 1 emoji are not in the font (the first: grinning face)" in capsys.readouterr().out
    assert "1f600.png" not in members(tmp_path / "a.tar") and len(members(tmp_path / "b.tar")) == 1 + 3 * 18


def test_options_and_outputs_that_cannot_be(tiny, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        make(monkeypatch, tmp_path / "a.tar", "--size", 500)
    assert "--size must be from 16 to 128" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert make(monkeypatch, tmp_path / "file/a.tar", "--font", tiny / "font.ttf", "--names", tiny / "names.txt") == 1
    assert capsys.readouterr().err.startswith("make_emoji: error: cannot write")


@pytest.mark.skipif(
    not (FONT.exists() and NAMES.exists()), reason="needs apt-get install fonts-noto-color-emoji unicode-data"
)
def test_the_font_of_debian():
    """Every emoji has a picture, and the captions tell all of them apart, as the names do."""
    names, font = read_names(NAMES), read_font(FONT)
    assert len(names) > 3600
    assert all(font.bitmap(one.characters).startswith(b"\x89PNG") for one in names)
    captions = [caption(one) for one in names]
    known = combinations(names)
    assert len({one.role for one in known.values()}) >= 74 and len(known) >= 1326
    doubled = {text for text in captions if captions.count(text) > 1}
    assert not doubled
