"""Write scikit-learn's 1,797 scans of handwritten digits as a webdataset tar: real data without a download.

The scans (8 x 8, values 0 to 16, from the UCI "Optical Recognition of Handwritten Digits" test set) are enlarged to
32 x 32 RGB. The tar holds `00000.png`, `00000.cls`, `00001.png`, ... and, with --captions, `00000.txt`, ...: sentences
of varying form that name the digit. tools/encode_latents.py reads it as it would a user's own images. The same versions
of the libraries write the same bytes.
"""

import argparse
import io
import sys

import numpy as np
from PIL import Image

from rdm_scale.config.paths import any_option
from rdm_scale.encoding.tars import pack_tar
from rdm_scale.storage.location import Location

SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = (
    "a handwritten {}",
    "the digit {}",
    "someone wrote the number {} by hand",
    "{}",
    "a scan of the figure {} from an old form",
    "here you see a {}, drawn with a pen",
    "the number {} in white on black",
    "a small picture of a {}",
)


def png(scan: np.ndarray) -> bytes:
    """Encode a scan [8, 8] with values 0..16 as a 32 x 32 RGB PNG."""
    small = Image.fromarray(np.rint(scan * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def caption(index: int, label: int) -> str:
    """Caption of a scan: the forms in turn, with the digit as a word or, in every third caption, as a figure."""
    return FORMS[index % len(FORMS)].format(label if index % 3 == 2 else WORDS[label])


def digits_tar(captions: bool = False) -> bytes:
    """The tar of all scans, with their classes and, if asked for, captions."""
    from sklearn.datasets import load_digits  # slow to import, and not needed for --help

    scans, labels = load_digits(return_X_y=True)

    def sample(index: int) -> dict[str, bytes]:
        files = {"png": png(scans[index].reshape(8, 8)), "cls": str(labels[index]).encode()}
        return files | ({"txt": caption(index, int(labels[index])).encode()} if captions else {})

    return pack_tar(map(sample, range(len(scans))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "output", type=any_option, metavar="OUTPUT.tar", help="where to write it (a path or any fsspec URL)"
    )
    parser.add_argument("--captions", action="store_true", help="with a sentence about each scan")
    options = parser.parse_args()
    output = Location(options.output)
    try:
        output.parent.make_dir()
        output.write(digits_tar(options.captions))
    except OSError as error:
        print(f"make_digits: error: cannot write {output}: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
