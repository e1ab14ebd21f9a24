"""CIFAR-100 with its 100 fine classes: a file of 50,000 training and one of 10,000 test images, in cifar-100-python
(pickles) or cifar-100-binary (plain bytes, each image after its coarse and its fine class); or class folders."""

from __future__ import annotations

from pathlib import Path

from pliant.data.index import Pixels
from pliant.data.sources.cifar import Form, damaged, find_folder, open_cifar, read_pickle

CLASSES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 - a hundred quoted lines would hide the list
)
FORM = Form(
    title="CIFAR-100",
    source="cifar100",
    binary="cifar-100-binary",
    pickled="cifar-100-python",
    train=("train",),
    test="test",
    label_bytes=2,
    label_key="fine_labels",
    classes=100,
)


def open_cifar100(root: Path | None) -> tuple[Pixels, Pixels]:
    """Read the training and the test images, labelled by their fine classes.

    Args:
        root: the folder that holds `cifar-100-python` or `cifar-100-binary`, or one of these itself; or
            `train/CLASS/*.png` and `test/CLASS/*.png`.

    Raises:
        UserError: none of these is there, or a file is missing or damaged.
    """
    folder = None if root is None else find_folder(FORM, root)
    return open_cifar(FORM, root, CLASSES if folder is None else _names(folder))


def _names(folder: Path) -> tuple[str, ...]:
    """The names that stand beside the images, else the usual ones."""
    table, text = folder / "meta", folder / "fine_label_names.txt"
    names: object = CLASSES
    if table.is_file():
        names = read_pickle(table, FORM).get("fine_label_names")
    elif text.is_file():
        try:
            names = text.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            raise damaged(FORM, text, "it is no readable text") from None
    if not isinstance(names, list | tuple) or len(names) != FORM.classes or not all(isinstance(n, str) for n in names):
        raise damaged(FORM, table if table.is_file() else text, "it does not name 100 classes")
    return tuple(names)
