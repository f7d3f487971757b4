"""Draw wordnet_nouns.tsv, the quickstart's data, from WordNet 3.0: ``python make_sample.py /usr/share/wordnet``.

The folder holds ``index.noun`` and ``data.noun`` (Debian's package ``wordnet-base``). The same files give the same
sample. A row is ``noun<TAB>gloss``, in random order, so that any slice of the file is a fair sample.
"""

import argparse
import random
import re
from pathlib import Path

NUM_ROWS = 2000
NUM_WORDS = range(4, 19)  # per gloss
# single lower-case words; ``index.noun`` is all lower case, so proper nouns are told apart in ``data.noun``
NOUN = re.compile(r"[a-z]{3,16}")
# WordNet marks insults and swear words in the gloss; a handful of topics are no fun in an example either
# WordNet marks insults and swear words in the gloss; some topics are no fun in an example either
UNWANTED = re.compile(
    r"offensive|disparag|derogat|obscen|vulgar|slur|insult|slang|contempt|stupid|\bugly|\bfat (?:person|wom|man)|"
    r"golliw|slave|sex|seduc|prostitut|genital|penis|vagina|\brap(?:e|ist)\b|porn|nazi|genocid|suicid|incest|bestial|"
    r"negro|\bjew(?:s|ish)?\b|moslem|muslim|\brac(?:e|ial)\b|ethnic|feces|excre|retard",
    re.IGNORECASE,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wordnet", type=Path, help="folder with index.noun and data.noun")
    rows = sorted(definitions(parser.parse_args().wordnet).items())
    sample = random.Random(0).sample(rows, NUM_ROWS)
    path = Path(__file__).with_name("wordnet_nouns.tsv")
    path.write_text("".join(f"{noun}\t{gloss}\n" for noun, gloss in sample), encoding="utf-8")
    print(f"{len(sample)} of {len(rows)} definitions in {path.name}")


def definitions(wordnet: Path) -> dict[str, str]:
    """Map each noun that names its own most frequent sense to that sense's gloss, examples cut off.

    A synset counts once, under its first word, so that no synonym of a training word is held out with the same gloss.
    Formats: the manual page ``wndb(5)``.
    """
    first_sense = {}
    for line in entries(wordnet / "index.noun"):
        lemma, *_ = fields = line.split()
        num_senses = int(fields[2])
        first_sense[lemma] = fields[-num_senses]
    result = {}
    for line in entries(wordnet / "data.noun"):
        head, _, text = line.partition(" | ")
        offset, _, _, _, noun, *_ = head.split()
        gloss = text.partition('; "')[0].strip(" ;")
        wanted = NOUN.fullmatch(noun) and first_sense[noun] == offset and len(gloss.split()) in NUM_WORDS
        if wanted and '"' not in gloss and not UNWANTED.search(f"{noun} {gloss}"):
            result[noun] = gloss
    return result


def entries(path: Path) -> list[str]:
    """Read the lines of a WordNet file below its licence, whose lines are indented by two spaces."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]


if __name__ == "__main__":
    main()
