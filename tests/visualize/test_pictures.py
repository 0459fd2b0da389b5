"""The pictures of attention maps: what is drawn where, and the errors."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused.visualize import attention_grid

Networks = dict[str, list[Tensor]]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def networks() -> Networks:
    draw = torch.Generator().manual_seed(1)
    return {
        "student": [torch.randn(2, 4, 6, 8, generator=draw), torch.randn(2, 8, 3, 4, generator=draw)],
        "teacher": [torch.randn(2, 16, 6, 8, generator=draw), torch.randn(2, 8, 6, 8, generator=draw)],
    }


def assert_apart(figure) -> None:  # type: ignore[no-untyped-def]
    """Texts and pictures lie on the page, and not on each other."""
    figure.savefig(io.BytesIO(), format="png")
    artists = [*figure.texts, *(t for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label))]
    artists += figure.axes[-1].get_yticklabels()  # of the colour bar
    artists = [text for text in artists if text.get_text()] + drawn(figure)
    boxes = [artist.get_window_extent().padded(-1.5) for artist in artists]  # pixels: they may touch
    page = figure.bbox
    for artist, box in zip(artists, boxes, strict=True):
        assert page.x0 <= box.x0 < box.x1 <= page.x1, artist
        assert page.y0 <= box.y0 < box.y1 <= page.y1, artist
    for (one, box), (other, other_box) in itertools.combinations(zip(artists, boxes, strict=True), 2):
        assert not box.overlaps(other_box), (one, other)


def drawn(figure) -> list:  # type: ignore[no-untyped-def, type-arg]
    """The axes that hold a picture, row by row (the colour scale holds none)."""
    return [axes for axes in figure.axes if axes.images]


@pytest.mark.parametrize("p, mapping", [(2, "sum"), (1, "max")])
def test_draws_image_and_maps_scaled_and_enlarged(
    images: Tensor, networks: Networks, p: float, mapping: str
) -> None:
    axes = drawn(attention_grid(images, networks, p=p, mapping=mapping))
    assert len(axes) == 2 * (1 + 2 * 2)
    order = [
        ("student", 0),
        ("teacher", 0),
        ("student", 1),
        ("teacher", 1),
    ]  # by group, networks side by side
    for row in range(2):
        picture, *maps = axes[5 * row : 5 * row + 5]
        np.testing.assert_array_equal(picture.images[0].get_array(), images[row].permute(1, 2, 0))
        for (name, group), cell in zip(order, maps, strict=True):
            powers = networks[name][group][row].double().abs() ** p
            expected = powers.sum(0) if mapping == "sum" else powers.amax(0)
            expected = F.interpolate(expected[None, None], (12, 16), mode="bilinear", align_corners=False)[
                0, 0
            ]
            np.testing.assert_allclose(cell.images[0].get_array(), expected / expected.max(), rtol=1e-5)
            assert cell.images[0].get_clim() == (0, 1)


def test_places_maps_right_of_the_image_in_rows(images: Tensor, networks: Networks) -> None:
    axes = drawn(attention_grid(images, networks))
    lefts = [cell.get_position().x0 for cell in axes[:5]]
    assert lefts == sorted(set(lefts))
    assert [cell.get_position().x0 for cell in axes[5:]] == lefts
    assert axes[5].get_position().y1 < axes[0].get_position().y0


def test_names_groups_networks_and_images(images: Tensor, networks: Networks) -> None:
    figure = attention_grid(images, networks, groups=["early", "late"], labels=["a cat", "a dog"])
    axes = drawn(figure)
    assert [axes[0].get_ylabel(), axes[5].get_ylabel()] == ["a cat", "a dog"]
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["image", "early (6×8)", "student", "teacher", "late (3×4, 6×8)", "student", "teacher"]
    assert attention_grid(images, networks).texts[1].get_text() == "group 1 (6×8)"
    for cell, title in zip(axes[1:5], figure.texts[2:4] + figure.texts[5:], strict=True):
        box = cell.get_position()
        assert box.x0 < title.get_position()[0] < box.x1
        assert title.get_position()[1] > box.y1


def test_several_powers_give_a_row_per_image_and_network(images: Tensor, networks: Networks) -> None:
    figure = attention_grid(images, networks, p=[1, 2, 4], labels=["a cat", "a dog"])
    axes = drawn(figure)
    assert len(axes) == 2 * (1 + 2 * 2 * 3)  # the image once, then networks x groups x powers
    assert [text.get_text() for text in figure.texts[2:5]] == ["p = 1", "p = 2", "p = 4"]
    for image, start in ((0, 0), (1, 13)):
        np.testing.assert_array_equal(axes[start].images[0].get_array(), images[image].permute(1, 2, 0))
        cells = iter(axes[start + 1 : start + 13])
        for name in networks:
            for group in range(2):
                for place, power in enumerate((1, 2, 4)):
                    cell = next(cells)
                    assert cell.get_ylabel() == (name if group == place == 0 else "")
                    expected = networks[name][group][image].double().abs().pow(power).sum(0)[None, None]
                    expected = F.interpolate(expected, (12, 16), mode="bilinear", align_corners=False)[0, 0]
                    np.testing.assert_allclose(
                        cell.images[0].get_array(), expected / expected.max(), rtol=1e-5
                    )


def test_one_scale_for_the_normalised_maps_of_a_group(images: Tensor, networks: Networks) -> None:
    axes = drawn(attention_grid(images, networks, scale="group"))
    for image in range(2):
        for group in range(2):
            expected = []
            for name in networks:
                found = networks[name][group][image].double().square().sum(0)
                found = (found / found.norm() * found.numel() ** 0.5)[None, None]
                expected.append(F.interpolate(found, (12, 16), mode="bilinear", align_corners=False)[0, 0])
            largest = max(e.max() for e in expected)
            for place, each in enumerate(expected):
                cell = axes[5 * image + 1 + 2 * group + place]
                np.testing.assert_allclose(cell.images[0].get_array(), each / largest, rtol=1e-5)


def test_overlays_the_map_on_the_grey_image(images: Tensor, networks: Networks) -> None:
    axes = drawn(attention_grid(images, networks, overlay=True))
    beside = drawn(attention_grid(images, networks))
    for cell, other in zip(axes[1:5], beside[1:5], strict=True):
        under, over = cell.images
        np.testing.assert_allclose(under.get_array(), images[0].mean(0), rtol=1e-6)
        np.testing.assert_array_equal(over.get_array(), other.images[0].get_array())
        assert 0 < over.get_alpha() < 1
    assert len(axes[0].images) == 1


def test_writes_captions_above_the_first_map_of_a_network(images: Tensor, networks: Networks) -> None:
    captions = {"student": ["cat", "cat"], "teacher": ["a cat", "a dog"]}
    axes = drawn(attention_grid(images, networks, captions=captions))
    assert [cell.get_title() for cell in axes[:5]] == ["", "cat", "a cat", "", ""]
    assert [cell.get_title() for cell in axes[5:]] == ["", "cat", "a dog", "", ""]
    axes = drawn(attention_grid(images, networks, captions=captions, p=[1, 2]))
    titles = [cell.get_title() for cell in axes]
    assert titles == ["", "cat", "", "", "", "a cat", "", "", "", "", "cat", "", "", "", "a dog", "", "", ""]


@pytest.mark.parametrize("p", [2, [1, 2]])
def test_long_texts_stay_inside_and_apart(images: Tensor, networks: Networks, p: list[float]) -> None:
    long = {f"a network with a very long name, the {name}": found for name, found in networks.items()}
    captions = {name: ["German short-haired pointer, retriever"] * 2 for name in long}
    labels = ["an_unbroken_name_of_a_file_123", "a name in several words, all short"]
    groups = ["features.transition1.convolution", "features.transition2.convolution"]
    first = next(iter(long))
    figure = attention_grid(
        images, long, p=p, labels=labels, captions=captions, groups=groups, compare_to=first, scale="group"
    )
    assert_apart(figure)


@pytest.mark.parametrize("p", [2, [1, 2]])
def test_texts_beside_flat_pictures_are_apart_and_not_cut_to_letters(p: float | list[float]) -> None:
    features = [torch.rand(2, 4, 2, 20)]
    networks = {"student alone": features, "student with attention transfer": features}
    captions = {name: ["a dog", "a cat"] for name in networks}
    flat, labels = torch.rand(2, 3, 20, 200), ["a label in several words, not short", "b"]
    figure = attention_grid(flat, networks, p=p, labels=labels, captions=captions, compare_to="student alone")
    assert_apart(figure)
    if isinstance(p, list):
        assert "student\nalone" in [axes.get_ylabel() for axes in figure.axes]
    assert_apart(attention_grid(flat[:1], {"a": [features[0][:1]]}, scale="group"))


def test_headings_break_within_names_where_words_end(images: Tensor, networks: Networks) -> None:
    groups = ["features.denseblock1.denselayer1.conv2", "blocks/an_unbroken_name/of_a_module"]
    one = {"student": networks["student"]}
    texts = [text.get_text() for text in attention_grid(images, one, groups=groups).texts]
    for text, group in zip((texts[1], texts[3]), groups, strict=True):
        assert text.replace("\n", "").startswith(group)
        first, *others = text.split("\n")
        assert others
        assert first.endswith((".", "_", "/"))


@pytest.mark.parametrize(
    "options, heading",
    [
        ({"p": 2}, "late (6×8)"),
        ({"p": [3.5]}, "late (6×8, p = 3.5)"),
        ({"p": 1, "mapping": "max"}, "late (6×8, p = 1, max)"),
        ({"p": [1, 2], "mapping": "max"}, "late (6×8, max)"),
    ],
)
def test_headings_say_how_maps_were_made(images: Tensor, options: dict[str, object], heading: str) -> None:
    features = torch.rand(2, 4, 6, 8)
    figure = attention_grid(images, {"a": [features], "b": [features]}, groups=["late"], **options)  # type: ignore[arg-type]
    assert heading in [text.get_text().replace("\n", " ") for text in figure.texts]
    ready = attention_grid(images, {"a": [features[:, 0]]}, groups=["late"], p=1)
    assert "late (6×8)" in [text.get_text().replace("\n", " ") for text in ready.texts]


def test_writes_the_similarity_below_each_map(images: Tensor, networks: Networks) -> None:
    axes = drawn(attention_grid(images, networks, compare_to="teacher"))
    for row in range(2):
        student, teacher = (
            networks[name][0][row].double().square().sum(0) for name in ("student", "teacher")
        )
        cosine = (student * teacher).sum() / (student.norm() * teacher.norm())
        assert axes[5 * row + 1].get_xlabel() == f"{cosine.item():.2f}"
        # group 2: the teacher's map is resized to the student's grid first
        student, teacher = (
            networks[name][1][row].double().square().sum(0) for name in ("student", "teacher")
        )
        teacher = F.interpolate(teacher[None, None], (3, 4), mode="bilinear", align_corners=False)[0, 0]
        cosine = (student * teacher).sum() / (student.norm() * teacher.norm())
        assert axes[5 * row + 3].get_xlabel() == f"{cosine.item():.2f}"
        assert axes[5 * row + 2].get_xlabel() == axes[5 * row + 4].get_xlabel() == ""


def test_says_what_the_numbers_below_the_maps_are(images: Tensor, networks: Networks) -> None:
    """Once in each row that has such numbers, below the image."""
    figure = attention_grid(images, networks, compare_to="teacher")
    told = [text for text in figure.texts if text.get_text() == "cosine to teacher"]
    cells = [drawn(figure)[0], drawn(figure)[5]]
    for text, cell in zip(told, cells, strict=True):
        box = cell.get_position()
        assert box.x0 < text.get_position()[0] < box.x1
        assert text.get_position()[1] < box.y0
    several = attention_grid(images, networks, compare_to="teacher", p=[1, 2])
    assert [text.get_text() for text in several.texts].count(
        "cosine to teacher"
    ) == 2  # not in the teacher's rows
    assert not any("cosine" in text.get_text() for text in attention_grid(images, networks).texts)


def test_a_note_stands_below_everything(images: Tensor, networks: Networks) -> None:
    note = "random weights: " + ", ".join(["a-network-with-a-long-name"] * 9)
    figure = attention_grid(images, networks, compare_to="teacher", note=note)
    (text,) = [text for text in figure.texts if text.get_text().startswith("random weights")]
    assert text.get_text().replace("\n", " ").replace("- ", "-") == note
    assert text.get_position()[1] < min(cell.get_position().y0 for cell in figure.axes)
    assert_apart(figure)


def test_equal_networks_are_alike(images: Tensor, networks: Networks) -> None:
    same = {"one": networks["student"], "other": [3 * feature for feature in networks["student"]]}
    axes = drawn(attention_grid(images, same, compare_to="other"))
    assert axes[1].get_xlabel() == "1.00"
    np.testing.assert_allclose(axes[1].images[0].get_array(), axes[2].images[0].get_array(), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-8, 1e4])
def test_similarity_does_not_depend_on_the_scale(images: Tensor, networks: Networks, factor: float) -> None:
    """As small as gradients are, or as large as an early layer's p = 4."""
    same = {"one": networks["student"], "other": [factor * feature for feature in networks["student"]]}
    axes = drawn(attention_grid(images, same, p=4, compare_to="other"))
    assert axes[1].get_xlabel() == "1.00"


def test_takes_ready_maps_bytes_grey_and_half_precision(images: Tensor, networks: Networks) -> None:
    grey = (images[:, :1] * 255).to(torch.uint8)
    features = networks["student"]
    maps = [feature.square().sum(1) for feature in features]
    mixed = {"features": [feature.double() for feature in features], "maps": maps}
    axes = drawn(attention_grid(grey, mixed))
    np.testing.assert_allclose(axes[0].images[0].get_array(), grey[0, 0] / 255)
    for group in (0, 1):
        one, other = (axes[1 + 2 * group + i].images[0].get_array() for i in (0, 1))
        np.testing.assert_allclose(one, other, rtol=1e-5)
    attention_grid(grey, {"half": [feature.bfloat16().requires_grad_() for feature in features]})


def test_a_map_of_zeros_is_drawn_as_zeros(images: Tensor) -> None:
    axes = drawn(attention_grid(images, {"dead": [torch.zeros(2, 4, 3, 4)]}))
    assert np.array_equal(axes[1].images[0].get_array(), np.zeros((12, 16)))


@pytest.mark.parametrize("p", [2, [1, 2]])
def test_texts_are_taken_as_they_are(images: Tensor, networks: Networks, p: float | list[float]) -> None:
    """No formulas in them, and a network may be called ""."""
    texts = ["$5 $", "$\\frac$"]
    named = {"$_{$": networks["student"], "": networks["teacher"]}
    captions = dict.fromkeys(named, texts)
    figure = attention_grid(images, named, groups=texts, labels=texts, captions=captions, p=p)
    figure.savefig(io.BytesIO(), format="png")
    assert not any(text.get_parse_math() for text in figure.texts)
    titles = [cell.get_title() for cell in drawn(figure)]
    assert titles.count(texts[0]) == titles.count(texts[1]) == len(named)


def test_saves_a_png(images: Tensor, networks: Networks) -> None:
    file = io.BytesIO()
    attention_grid(images, networks, labels=["a", "b"], compare_to="teacher").savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.rand(2, 2, 8, 8)}, r"\(2, 2, 8, 8\)"),
        ({"images": torch.rand(3, 8, 8)}, r"\(3, 8, 8\)"),
        ({"images": torch.rand(0, 3, 8, 8)}, r"\(0, 3, 8, 8\)"),
        ({"images": torch.rand(5, 3, 8, 8)}, r"student, group 1: .* of 5 images, got \(2, 4, 6, 8\)"),
        ({"networks": {}}, "number of groups"),
        ({"networks": {"a": []}}, "number of groups"),
        ({"networks": {"a": [torch.rand(2, 4)]}}, r"a, group 1: .*got \(2, 4\)"),
        ({"networks": {"a": [torch.rand(2, 4, 4)], "b": [torch.rand(2, 4, 4)] * 2}}, "'a': 1, 'b': 2"),
        ({"groups": ["one"]}, "1 group headings for 2 groups"),
        ({"labels": ["one"]}, "1 labels for 2 images"),
        ({"compare_to": "techer"}, "techer.*student.*teacher"),
        ({"captions": {"techer": ["a", "b"]}}, "techer.*student.*teacher"),
        ({"captions": {"teacher": ["a"]}}, "1 captions of teacher for 2 images"),
        ({"p": []}, "p must be .*, got none"),
        ({"scale": "all"}, "own.*group.*'all'"),
        ({"networks": {"a": [torch.rand(2, 4, 4)]}, "p": [1, 2]}, r"a, group 1: several p .*\(2, 4, 4\)"),
    ],
)
def test_refuses_what_does_not_fit(
    images: Tensor, networks: Networks, change: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"images": images, "networks": networks} | change
    with pytest.raises(ValueError, match=message):
        attention_grid(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_maps_that_are_not_finite(images: Tensor, networks: Networks, value: float) -> None:
    networks["teacher"][1][1, 2, 0, 0] = value
    with pytest.raises(ValueError, match=r"^teacher, late: the map holds NaN or infinity \(weights that div"):
        attention_grid(images, networks, groups=["early", "late"])
    large = {"student": [10 * torch.ones(2, 4, 3, 4)]}
    with pytest.raises(ValueError, match=r"student, group 1: .* or p = 60 overflows"):
        attention_grid(images, large, p=[2, 60])


def test_tokens_are_no_maps(images: Tensor) -> None:
    tokens = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="vit, group 1: ready maps are non-negative") as error:
        attention_grid(images, {"vit": [tokens]})
    advice = "feat[:, 1:].unflatten(1, (14, 14)).movedim(-1, 1)"
    assert str(error.value).endswith(f"tokens (B, N, C) get their grid by {advice}")
    assert advice in (attention_grid.__doc__ or "")
    attention_grid(images, {"vit": [tokens[:, 1:].unflatten(1, (2, 2)).movedim(-1, 1)]})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": [3, 5]}, "labels must be strings, got int"),
        ({"labels": torch.tensor([3, 5])}, "labels must be strings, got Tensor"),
        ({"labels": "ab"}, "labels must be several strings, got the single string 'ab'"),
        ({"groups": [1, 2]}, "groups must be strings, got int"),
        ({"captions": {"teacher": torch.tensor([1, 2])}}, "captions of teacher must be strings, got Tensor"),
        ({"networks": {1: [torch.rand(2, 4, 3, 3)]}}, "names of networks must be strings, got int"),
    ],
)
def test_refuses_texts_that_are_none(
    images: Tensor, networks: Networks, change: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"images": images, "networks": networks} | change
    with pytest.raises(TypeError, match=message):
        attention_grid(**arguments)  # type: ignore[arg-type]


def test_refuses_images_of_another_range(images: Tensor, networks: Networks) -> None:
    for other in (255 * images, 2 * images - 1, images / 0):
        with pytest.raises(ValueError, match=r"0\.\.1, got .*divide .* by 255, or undo the normalisation"):
            attention_grid(other, networks)
    attention_grid(1.2 * images - 0.1, networks)  # what resizing may leave


def test_refuses_wide_integers(images: Tensor, networks: Networks) -> None:
    with pytest.raises(TypeError, match=r"uint8 or floating point, got torch\.int64"):
        attention_grid((255 * images).long(), networks)


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, at_fused.visualize; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_says_so_where_matplotlib_is_missing(
    images: Tensor, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        attention_grid(images, networks)
