"""The knowledge stage: gives each post the caption and the auxiliary knowledge that it did not bring (§3.2.1)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING

from gem_ray import model_paths
from gem_ray.config import Config, ExplainerConfig
from gem_ray.data.images import ImageLoader
from gem_ray.knowledge.cache import AnswerCache
from gem_ray.knowledge.explainer import Explainer, ExplainerError
from gem_ray.knowledge.prompts import PROMPT_VERSION, KnowledgeQuery
from gem_ray.records import Post, ProblemKind

if TYPE_CHECKING:
    from gem_ray.knowledge.captioner import Captioner
    from gem_ray.knowledge.explainer_vllm import VllmExplainer


class KnowledgeProvider:
    """Stage KNOWLEDGE. Fills `caption` and `knowledge` where they are blank; what a post brings is never replaced.

    A question that fails costs the post its knowledge alone. So does an empty answer, which is not a failure.

    Args:
        loader: fills `post.image` for the captioner, or records on the post why it cannot.
        captioner: `None` leaves posts without a caption as they are.
        captioner_id: the captioner's name and content hash, for the cache.
        explainer: `None` leaves posts without knowledge as they are.
        cache: captions and answers of earlier runs.

    Attributes:
        asked: questions put to the explainer.
        from_cache: posts whose knowledge (or lack of it) was known from an earlier question.
        repaired: answers that were not the JSON asked for.
        failed: questions without answer.
    """

    def __init__(
        self,
        loader: ImageLoader,
        captioner: Captioner | None = None,
        captioner_id: str = "",
        explainer: Explainer | VllmExplainer | None = None,
        cache: AnswerCache | None = None,
    ) -> None:
        self._loader = loader
        self._captioner = captioner
        self._captioner_id = captioner_id
        self._explainer = explainer
        self._cache = cache
        self.asked = self.from_cache = self.repaired = self.failed = 0

    @classmethod
    def from_config(cls, config: Config) -> KnowledgeProvider:
        """Load what the `knowledge` section names.

        Raises:
            FileNotFoundError: there is no such captioner, or no such model for vLLM.
            ConfigError: the explainer's key cannot be sent, or its model takes no conversations.
        """
        knowledge = config.knowledge
        captioner, captioner_id = None, ""
        if knowledge.captioner is not None:
            from gem_ray.knowledge.captioner import Captioner  # needs torch; asking an endpoint does not

            captioner, captioner_id = Captioner.from_config(config), model_paths.describe(knowledge.captioner)
        return cls(
            loader=ImageLoader.from_config(config),
            captioner=captioner,
            captioner_id=captioner_id,
            explainer=load_explainer(knowledge.explainer) if knowledge.explainer else None,
            cache=AnswerCache(knowledge.cache) if knowledge.cache else None,
        )

    @property
    def keeps_encoded(self) -> bool:
        """As of `ImageLoader`."""
        return self._loader.keeps_encoded

    @keeps_encoded.setter
    def keeps_encoded(self, value: bool) -> None:
        self._loader.keeps_encoded = value

    @property
    def counts(self) -> dict[str, int]:
        """What the stage has counted, for the run's account: of questions, and of images that it has fetched."""
        own = {name: getattr(self, name) for name in ("asked", "from_cache", "repaired", "failed")}
        return own | self._loader.counts

    @property
    def trouble(self) -> str | None:
        """Where images or answers do not come from at the moment; None while they do."""
        return self._loader.trouble or getattr(self._explainer, "trouble", None)

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Caption, then explain, the posts that are not rejected."""
        accepted = [post for post in posts if not post.is_rejected]
        if self._captioner is not None:
            self._fill_captions([post for post in accepted if _is_blank(post.caption)], self._captioner)
        if self._explainer is not None:
            self._fill_knowledge([post for post in accepted if _is_blank(post.knowledge)], self._explainer)
        return posts

    def _fill_captions(self, posts: list[Post], captioner: Captioner) -> None:
        self._loader.load_all([post for post in posts if post.image_bytes is None])
        new = [post for post in posts if not self._recall_caption(post)]
        self._loader.load_all(new)
        same_image: dict[str | None, list[Post]] = defaultdict(list)  # reposts are captioned once
        for post in new:
            if post.image is not None:
                same_image[_image_digest(post)].append(post)
        captions = captioner.caption([same[0].image for same in same_image.values() if same[0].image is not None])
        for (digest, same), caption in zip(same_image.items(), captions, strict=True):
            self._keep(caption, "caption", self._captioner_id, digest)
            for post in same:
                post.caption = caption or None

    def _recall_caption(self, post: Post) -> bool:
        digest = _image_digest(post)
        known = self._recall("caption", self._captioner_id, digest) if digest else None
        post.caption = known or None
        return known is not None

    def _fill_knowledge(self, posts: list[Post], explainer: Explainer | VllmExplainer) -> None:
        waiting: dict[KnowledgeQuery, list[Post]] = defaultdict(list)  # by question: reposts are asked about once
        for post in posts:
            query = KnowledgeQuery(post.text, None if _is_blank(post.caption) else post.caption)
            known = self._recall(*_knowledge_key(query, explainer))
            if known is None:
                waiting[query].append(post)
            else:
                self.from_cache += 1
                post.knowledge = known or None
        self.asked += len(waiting)
        for query, answer in explainer.ask_all(waiting):
            if isinstance(answer, ExplainerError):
                self.failed += 1
                for post in waiting[query]:
                    post.fail("knowledge", ProblemKind.KNOWLEDGE_FAILED, str(answer))
                continue
            self.repaired += answer.repaired
            self._keep(answer.text, *_knowledge_key(query, explainer))
            for post in waiting[query]:
                post.knowledge = answer.text or None

    def _recall(self, *key: str | None) -> str | None:
        return self._cache.get(*key) if self._cache else None

    def _keep(self, value: str, *key: str | None) -> None:
        if self._cache:
            self._cache.put(value, *key)


def load_explainer(config: ExplainerConfig) -> Explainer | VllmExplainer:
    """The explainer that `engine` names. Imports only the library that it needs."""
    if config.engine == "vllm":
        from gem_ray.knowledge.explainer_vllm import VllmExplainer

        return VllmExplainer.from_config(config)
    return Explainer(config)


def _knowledge_key(query: KnowledgeQuery, explainer: Explainer | VllmExplainer) -> tuple[str | None, ...]:
    return ("knowledge", query.text, query.caption, explainer.model, PROMPT_VERSION)


def _image_digest(post: Post) -> str | None:
    """SHA-256 of the encoded image, or of the loaded pixels where only a URI came; None without either."""
    if post.image_bytes is not None:
        return hashlib.sha256(post.image_bytes).hexdigest()
    if post.image is None:
        return None
    return hashlib.sha256(repr(post.image.shape).encode() + post.image.tobytes()).hexdigest()


def _is_blank(column: str | None) -> bool:
    return not (column or "").strip()
