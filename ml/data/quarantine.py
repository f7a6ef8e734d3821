"""Screening of a source's files: which become images of its manifest, and which are quarantined, and why."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml.core.messages import cut_text, list_items
from ml.core.taxonomy import find_folder_contradiction, label_of
from ml.data.image_facts import ImageFacts, ReadFacts, SourceFile, UnusableFile, read_file_name_facts
from ml.data.sources import SourceSpec
from ml.images.file_facts import PictureFacts


class _Image(NamedTuple):
    file: SourceFile
    facts: ImageFacts
    picture: PictureFacts


def screen_files(
    files: list[SourceFile],
    pictures: dict[str, PictureFacts],
    spec: SourceSpec,
    read_facts: ReadFacts = read_file_name_facts,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, str]], int]:
    """Turns decoded files into manifest rows and quarantine rows.

    These are left out, checked in this order:

    - a file about which no usable facts are known;
    - a file of an erased patient;
    - a file in a folder that contradicts its name;
    - a file whose name has a letter (benign or malignant) that contradicts its subtype;
    - a picture that does not decode;
    - a copy under the same name: the larger picture stays; of equals, the first path;
    - an image whose slide the source trusts under another subtype;
    - all images of a slide under two subtypes, since nobody can say which label is right;
    - all images with the same pixels under different subtypes;
    - a copy with the same pixels: the first stays.

    Copies are counted as duplicates; all others are quarantined.

    Returns:
        manifest rows; quarantine rows; the ties that the copies make between patients and slides, with the keys
        :data:`ml.data.manifest.TIE_COLUMNS`; and the number of duplicates.
    """
    quarantine: list[dict[str, Any]] = []
    by_name: dict[str, list[_Image]] = defaultdict(list)
    for image in _select_usable_files(files, pictures, spec, read_facts, quarantine):
        by_name[image.facts.key].append(image)
    # max keeps the first of equals, and the files came sorted by path.
    images = [max(copies, key=lambda copy: copy.picture.width * copy.picture.height) for copies in by_name.values()]
    duplicates = sum(len(copies) - 1 for copies in by_name.values())

    by_pixels: dict[str, list[_Image]] = defaultdict(list)
    for image in _select_consistent_images(images, spec, quarantine):
        by_pixels[image.picture.pixel_sha256].append(image)
    rows, ties = [], []
    for copies in by_pixels.values():
        if len({copy.facts.subtype for copy in copies}) > 1:
            paths = list_items(copy.file.path for copy in copies)
            detail = f"the same pixels under names of different subtypes: {paths}"
            quarantine += [
                make_quarantine_row(copy.file, copy.facts, spec.name, "conflicting_labels", detail) for copy in copies
            ]
        else:
            kept, *others = copies
            rows.append(_make_manifest_row(kept, spec))
            duplicates += len(others)
            ties += [tie for copy in others if (tie := _make_tie(copy, kept, spec))]
    rows.sort(key=lambda row: str(row["path"]))
    quarantine.sort(key=lambda row: str(row["path"]))
    return rows, quarantine, ties, duplicates


def _make_tie(copy: _Image, kept: _Image, spec: SourceSpec) -> dict[str, str] | None:
    """Returns the tie between a copy and the image that was kept; None if patient and slide are the same."""
    if (copy.facts.patient, copy.facts.slide) == (kept.facts.patient, kept.facts.slide):
        return None
    return {
        "pixel_sha256": copy.picture.pixel_sha256,
        "patient": copy.facts.patient,
        "slide": copy.facts.slide,
        "source": spec.name,
        "path": copy.file.path,
        "kept_patient": kept.facts.patient,
        "kept_slide": kept.facts.slide,
    }


def _select_usable_files(
    files: list[SourceFile],
    pictures: dict[str, PictureFacts],
    spec: SourceSpec,
    read_facts: ReadFacts,
    quarantine: list[dict[str, Any]],
) -> Iterator[_Image]:
    """Yields the files that are usable by themselves, sorted by path; adds the others to the quarantine."""
    for file in sorted(files):
        try:
            facts = read_facts(file.path)
        except UnusableFile as error:
            quarantine.append(make_quarantine_row(file, None, spec.name, error.reason, error.detail))
            continue
        if not file.sha256:
            quarantine.append(
                make_quarantine_row(file, facts, spec.name, "erased", "the patient was erased on request")
            )
            continue
        picture = pictures[file.sha256]
        if not spec.table and (contradiction := find_folder_contradiction(file.path)):
            quarantine.append(make_quarantine_row(file, facts, spec.name, "folder", contradiction))
        elif facts.label != label_of(facts.subtype):
            detail = f"the name says {facts.label}, but {facts.subtype} is {label_of(facts.subtype)}"
            quarantine.append(make_quarantine_row(file, facts, spec.name, "label", detail))
        elif picture.reason:
            quarantine.append(make_quarantine_row(file, facts, spec.name, picture.reason, picture.detail))
        else:
            yield _Image(file, facts, picture)


def _select_consistent_images(
    images: list[_Image], spec: SourceSpec, quarantine: list[dict[str, Any]]
) -> Iterator[_Image]:
    """Yields the images whose slide has one subtype or a trusted one; adds the others to the quarantine."""
    subtypes = defaultdict(set)
    for image in images:
        subtypes[image.facts.slide].add(image.facts.subtype)
    for image in images:
        slide = image.facts.slide
        trusted = spec.trusted_subtype(slide)
        if trusted and trusted != image.facts.subtype:
            detail = (
                f"{spec.file.name} trusts {trusted} for slide {cut_text(slide)}, and this says {image.facts.subtype}"
            )
            quarantine.append(make_quarantine_row(image.file, image.facts, spec.name, "not_trusted", detail))
        elif not trusted and len(subtypes[slide]) > 1:
            detail = f"slide {cut_text(slide)} stands under {' and '.join(sorted(subtypes[slide]))}"
            quarantine.append(
                make_quarantine_row(image.file, image.facts, spec.name, "slide_with_two_subtypes", detail)
            )
        else:
            yield image


def _make_manifest_row(image: _Image, spec: SourceSpec) -> dict[str, Any]:
    return {
        "path": image.file.path,
        "sha256": image.picture.scaled_sha256 or image.file.sha256,
        "pixel_sha256": image.picture.pixel_sha256,
        "perceptual_hash": image.picture.perceptual_hash,
        "source": spec.name,
        "cohort": spec.cohort,
        "patient": image.facts.patient,
        "slide": image.facts.slide,
        "subtype": image.facts.subtype,
        "label": image.facts.label,
        "magnification": image.facts.magnification,
        "seq": image.facts.seq,
        "width": image.picture.width,
        "height": image.picture.height,
    }


def make_quarantine_row(
    file: SourceFile, facts: ImageFacts | None, source: str, reason: str, detail: str
) -> dict[str, Any]:
    """Returns a row of quarantine.parquet; what is not known about the file is None."""
    return {
        "path": file.path,
        "sha256": file.sha256,
        "source": source,
        "reason": reason,
        "detail": detail,
        "patient": facts.patient if facts else None,
        "slide": facts.slide if facts else None,
        "subtype": facts.subtype if facts else None,
        "label": facts.label if facts else None,
        "magnification": facts.magnification if facts else None,
        "seq": facts.seq if facts else None,
    }
