"""sapo_kernels: score every paraphrase of an instruction on every example in one packed pass.

State-Adaptive Prompt Optimization (SAPO, arXiv 2606.01967). Importing needs torch and numpy only.
"""

from . import ops as _ops  # noqa: F401 (registers torch.ops.sapo_kernels)
from .accumulate.api import accumulate_
from .linear_logprob.api import linear_logprob
from .reweight.api import reweight_
from .reweight.prompt_state import PromptState
from .scoring.distributed import score_prompts_sharded
from .scoring.prompt_scores import PromptScores
from .scoring.race import Race
from .scoring.race_report import RaceReport
from .scoring.ranks import RankError
from .scoring.response_cache import ResponseCache
from .scoring.score import score_prompts
from .scoring.verify import verify
from .training.over_trie import OverTrie
from .training.tree_logprobs import tree_logprobs, use_tree_attention
from .training.trie_batch import TrieBatch
from .tree_attention.api import tree_attention
from .trie.trie import TokenTrie, TriePass, plan_trie

__all__ = [
    "OverTrie",
    "PromptScores",
    "PromptState",
    "Race",
    "RaceReport",
    "RankError",
    "ResponseCache",
    "TokenTrie",
    "TrieBatch",
    "TriePass",
    "accumulate_",
    "linear_logprob",
    "plan_trie",
    "reweight_",
    "score_prompts",
    "score_prompts_sharded",
    "tree_attention",
    "tree_logprobs",
    "use_tree_attention",
    "verify",
]

__version__ = "0.1.0"
