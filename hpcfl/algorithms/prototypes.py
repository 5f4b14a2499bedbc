"""Prototypes of each client: the mean features of the classes it has, sent apart where a server learns from them instead of averaging them."""
import torch
from torch import Tensor

from hpcfl.contract import ClientSite, Group, Totals, Uplink, Uploads
from hpcfl.latents.moments import measure


def describe_classes(group: Group, site: ClientSite) -> Uplink:
    """What each client sends of its training images: {"means": (c, p) float32, "classes": (c,) int32}, a row for each class it has."""
    messages = {}
    for client in group.clients:
        measured = measure(site.features(group, client), site.holdings[client].train.labels, site.problem.classes, full=False)
        held = measured.count > 0
        messages[client] = {"means": measured.mean[held].float(), "classes": held.nonzero().flatten().to(torch.int32)}
    return Uplink({"prototypes": Uploads(messages)})


def gather_prototypes(totals: Totals, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prototypes of all clients, (n, p), and their classes, (n,) int64, client after client."""
    uploads = [upload for _, upload in sorted(totals["prototypes"].trees.items())]
    return torch.cat([upload["means"] for upload in uploads]).to(device), torch.cat([upload["classes"] for upload in uploads]).long().to(device)
