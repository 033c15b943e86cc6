"""Graph network, distances in random graphs"""

import torch
import torch.nn as nn
import torch.nn.functional as F

METRIC = "validation squared error"
BATCH, STEPS = 32, 5000
NODES, TRAINING, VALIDATION = 24, 24576, 1024


def data():
    """Adjacency matrices of graphs, the mark of each node, and the standardised quantities."""
    generator, n = torch.Generator().manual_seed(0), TRAINING + VALIDATION
    edges = graphs(n, generator)
    marks = torch.zeros(n, NODES, dtype=torch.long)  # two nodes have the marks 1 and 2
    marked = torch.rand(n, NODES, generator=generator).topk(2).indices
    marks.scatter_(1, marked, torch.tensor([1, 2]).expand(n, 2))
    found = quantities(edges, marked)
    std, mean = torch.std_mean(found[:TRAINING], 0)
    columns = edges, marks, (found - mean) / std
    return tuple(x[:TRAINING] for x in columns), tuple(x[TRAINING:] for x in columns)


def graphs(n, generator):
    """(n, NODES, NODES) bool: connected graphs. Each is a random tree with up to NODES / 2 edges
    more; some trees are deep and others shallow."""
    edges, rows = torch.zeros(n, NODES, NODES, dtype=torch.bool), torch.arange(n)
    reach = torch.randint(2, NODES // 2, (n,), generator=generator)
    more = torch.randint(0, NODES // 2 + 1, (n,), generator=generator)
    for node in range(1, NODES):  # its parent is one of the `reach` nodes before it
        back = torch.rand(n, generator=generator) * reach.clamp(max=node)
        edges[rows, node, node - 1 - back.long()] = True
    for i in range(NODES // 2):
        a, b = torch.randint(0, NODES, (2, n), generator=generator)
        edges[rows, a, b] |= (a != b) & (i < more)
    return edges | edges.transpose(1, 2)


def quantities(edges, marked):
    """(n, 3): the mean distance of the nodes to each of the two marked ones, and the share of
    nodes nearer to the first less the share of nodes nearer to the second."""
    steps = edges.float() + torch.eye(NODES)
    reached = F.one_hot(marked, NODES).float()
    distance = torch.zeros_like(reached)
    for _ in range(NODES - 1):
        distance += reached == 0  # a graph is connected: this ends at the distance
        reached = (reached @ steps).clamp(max=1)
    first, second = distance.unbind(1)
    return torch.stack([first.mean(1), second.mean(1), (second - first).sign().mean(1)], 1)


class Layer(nn.Module):
    """Message passing: a node is updated by the sum of its neighbours' messages."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.message = nn.Linear(width, width)
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x, edges):
        y = self.norm(x)
        return x + self.update(torch.cat([y, edges @ self.message(y)], 2))


class GraphNetwork(nn.Module):
    def __init__(self, marks, outputs, width, depth):
        super().__init__()
        self.embedding = nn.Embedding(marks, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))

    def forward(self, edges, marks):
        x, edges = self.embedding(marks), edges.float()
        for layer in self.layers:
            x = layer(x, edges)
        return self.head(self.norm(x).mean(1))


def network():
    return GraphNetwork(marks=3, outputs=3, width=64, depth=6)


def score(net, edges, marks, targets):
    """(B,): the mean of the squared errors of a graph's quantities."""
    return (net(edges, marks) - targets).square().mean(1)


def loss(net, edges, marks, targets):
    return F.mse_loss(net(edges, marks), targets)
