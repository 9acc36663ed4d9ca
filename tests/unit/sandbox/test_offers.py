"""What agents offer, in the several ways in which they list it, and how one of it is chosen. SES-6."""

from typing import Any

import pytest

from services.runtime.errors import InvalidArgument
from services.sandbox.offers import choice, offer_of, selection

OPTIONS: dict[str, Any] = {
    "configOptions": [
        {"id": "thinking", "category": "thought_level", "currentValue": "low", "options": []},
        {
            "id": "the-model",
            "category": "model",
            "currentValue": "b",
            "options": [
                {"group": "g", "name": "G", "options": [{"value": "a", "name": "A", "description": "fast"}]},
                {"value": "b", "name": "B"},
            ],
        },
    ],
}
OLDER: dict[str, Any] = {
    "models": {"currentModelId": "x", "availableModels": [{"modelId": "x", "name": "X"}, {"modelId": "y"}]},
    "modes": {"currentModeId": "code", "availableModes": [{"id": "code", "name": "Code"}, {"id": "plan"}]},
}


def test_models_in_config_options_are_listed_with_those_of_groups_and_chosen_so() -> None:
    offer = offer_of("mock", {}, OPTIONS)
    assert [(one.id, one.display_name, one.description, one.is_default) for one in offer.agent.models] == [
        ("a", "A", "fast", False),
        ("b", "B", "", True),
    ]
    assert (offer.model, offer.mode) == ("b", "")
    wanted = {"configId": "the-model", "value": "a"}
    assert selection(OPTIONS, "model", "a", "claude") == ("session/set_config_option", wanted)


def test_models_and_modes_of_the_older_kind_are_listed_and_chosen_by_methods_of_their_own() -> None:
    offer = offer_of("mock", {}, OLDER)
    assert [one.id for one in offer.agent.models] == ["x", "y"]
    assert [(one.id, one.is_default) for one in offer.agent.modes] == [("code", True), ("plan", False)]
    assert selection(OLDER, "model", "y", "claude") == ("session/set_model", {"modelId": "y"})
    assert selection(OLDER, "mode", "plan", "claude") == ("session/set_mode", {"modeId": "plan"})


@pytest.mark.parametrize(("kind", "opened"), [("model", OLDER), ("mode", OPTIONS), ("mode", {})])
def test_what_an_agent_does_not_list_is_refused_with_what_it_does(kind: str, opened: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        selection(opened, kind, "nonesuch", "claude")
    assert refused.value.reason == "AGENT_UNKNOWN"
    assert refused.value.metadata["field"] == kind
    assert refused.value.metadata["agent"] == "claude"
    assert (", ".join(["x", "y"]) if kind == "model" else "none that can be chosen") in refused.value.message


def test_what_an_agent_can_do_is_told() -> None:
    can = {"loadSession": True, "promptCapabilities": {"image": True}}
    told = offer_of("mock", {"agentCapabilities": can}, {})
    assert told.takes_images
    assert told.agent.capabilities.resume
    assert not offer_of("mock", {}, {}).takes_images


def test_a_name_that_would_have_to_be_cut_is_not_offered() -> None:
    listed = {"models": {"availableModels": [{"modelId": "m" * 200}, {"modelId": "ok", "name": "n" * 999}]}}
    [only] = choice(listed, "model").items
    assert only.id == "ok"
    assert len(only.name.encode()) <= 256
