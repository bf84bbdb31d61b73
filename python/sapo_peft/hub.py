"""Whether the hub answers, so that without a network a name fails at once."""

from __future__ import annotations


def hub_answers(name: str, kind: str = "model") -> bool:
    """Whether the hub answers about a model or a dataset; also "there is none" is an answer.

    The libraries would ask for half a minute to a minute before they look at what is cached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
    except HfHubHTTPError:
        return True
    except Exception:
        return False
    return True
