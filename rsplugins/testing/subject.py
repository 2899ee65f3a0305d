"""The certifier under test, and how the contract runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rsplugins.certificate import Claim, Gathered, Guarantee, Norm
from rsplugins.certification import batched, certifier_class, is_labelled, prepare, run_certifier
from rsplugins.certifier import Execution
from rsplugins.classifier import Classifier
from rsplugins.errors import ParameterError, UsageError
from rsplugins.host import CertifierDescriptor, Entry, get_host
from rsplugins.testing.outcome import require

About = Literal["classifier", "smoothed", "own"]


class Result(NamedTuple):
    """Evidence and the claim read out of it."""

    gathered: Gathered
    claim: Claim


@dataclass(frozen=True)
class Subject:
    """A certifier, the parameters it is tested with, and what its claims are about.

    Attributes:
        entry: from the host.
        parameters: set by whoever tests; the contract adds its sample numbers and alpha to them.
        about: ``"classifier"``: the claims are about the Classifier itself; ``"smoothed"``: about its majority class under
            noise on raw pixels that is symmetric and independent over pixels; ``"own"``: about another function of the image, of
            which only the certifier knows. Decides which truth the claims are compared with.
        thorough: many more images.
        norm: that the claims are tested in.
        lp: whether the claims are of a ball in a norm.
    """

    entry: Entry
    parameters: Mapping[str, Any] = field(default_factory=dict)
    about: About = "classifier"
    thorough: bool = False
    norm: Norm = Norm.L2
    lp: bool = True

    @classmethod
    def find(cls, certifier: str | Entry, parameters: Mapping[str, Any], about: About | None, *, thorough: bool) -> Subject:
        """Find a certifier by name.

        Raises:
            UnknownNameError, PluginError, PluginUnavailableError: there is none, or it cannot be used.
        """
        entry = get_host().find("certifier", certifier) if isinstance(certifier, str) else certifier
        norm = parameters.get("norm", None)
        subject = cls(entry, dict(parameters), about or "own", thorough)
        fields = subject.fields()
        if about is None:
            guarantee = subject.descriptor.guarantee
            about = "smoothed" if guarantee is Guarantee.PROBABILISTIC or "sigma" in fields else "classifier"
        found = Norm(norm) if norm else next(iter(subject.descriptor.norms), Norm.L2)
        lp = isinstance(found, Norm)
        # Known radii are of lp balls: of another threat they serve as images, and its claims are about something else.
        return replace(subject, about=about if lp else "own", norm=found if isinstance(found, Norm) else Norm.LINF, lp=lp)

    @property
    def descriptor(self) -> CertifierDescriptor:
        """The descriptor, which is a certifier's."""
        descriptor = self.entry.descriptor
        if not isinstance(descriptor, CertifierDescriptor):
            raise self.entry.error()
        return descriptor

    def fields(self) -> set[str]:
        """Return the names of the certifier's parameters."""
        return set(certifier_class(self.entry).Parameters.model_fields)

    def settings(self, **wanted: Any) -> dict[str, Any]:
        """Return the tester's parameters, and of ``wanted`` what the certifier has and the tester left open."""
        known = self.fields()
        return {**{name: value for name, value in wanted.items() if name in known}, **self.parameters}

    def run(
        self,
        classifier: Classifier,
        images: Tensor,
        settings: Mapping[str, Any],
        *,
        execution: Execution | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Result]:
        """Gather evidence for images and read the claims."""
        certifier = prepare(self.entry, classifier, settings, execution or Execution(batch_size=64))
        certifier.check_images(images)
        values = certifier.parameters.model_dump(mode="json")
        claim = self.entry.load_claim()
        pairs = list(zip(range(len(images)) if indices is None else indices, images, strict=True))
        labels = [int(classifier(image[None]).argmax(1)) if is_labelled(self.entry) else None for _, image in pairs]
        inputs = [batched(certifier, *pair, place, label) for place, (pair, label) in enumerate(zip(pairs, labels, strict=True))]
        found = list(run_certifier(self.entry, certifier, inputs))
        require(len(found) == len(pairs), f"gather yielded {len(found)} results for {len(pairs)} inputs")
        failed = next((gathered for gathered in found if gathered.error is not None), None)
        require(failed is None, f"input {failed and failed.index} failed: {failed and failed.error}")
        return [Result(gathered, claim(gathered.evidence, values)) for gathered in found]

    def accepts(self, classifier: Classifier, settings: Mapping[str, Any], execution: Execution | None = None) -> str:
        """Return an empty text when the certifier takes this classifier, or the reason it gives for refusing."""
        try:
            prepare(self.entry, classifier, settings, execution or Execution())
        except (ParameterError, UsageError) as error:
            return error.what
        return ""
