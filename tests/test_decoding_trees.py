import pytest
import torch
from test_decoding_heads import random_head
from tiny_models import random_ids, tiny_model

from labutils.decoding.trees import TokenTree, TreeTarget, generate_tree, likeliest_tree, tree_mask, verify_tree
from labutils.generation.decode import generate_cached


def path_to(tree, node):
    return [*(path_to(tree, tree.parents[node]) if node else ()), node]


def test_tree_depths_by_hand():
    tree = TokenTree([9, 1, 2, 3, 4], [-1, 0, 0, 1, 3])
    assert tree.depths == [0, 1, 1, 2, 3] and path_to(tree, 4) == [0, 1, 3, 4]


def test_tree_mask_of_a_chain_is_causal():
    assert torch.equal(tree_mask([-1, 0, 1, 2]), torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-1, 2, 0], [-1, -1]])
def test_tree_mask_refuses_a_parent_that_is_not_earlier(parents):
    with pytest.raises(ValueError, match="parent must be an earlier node"):
        tree_mask(parents)


def test_verify_tree_by_hand():
    tree, logits = TokenTree([9, 1, 2, 3], [-1, 0, 0, 2]), torch.zeros(4, 5)
    for node, token in enumerate([2, 4, 3, 0]):  # the target's choice after each node
        logits[node, token] = 1
    assert verify_tree(logits, tree) == ([0, 2, 3], 0)
    logits[0] = torch.eye(5)[4]
    assert verify_tree(logits, tree) == ([0], 4)


def test_each_branch_is_read_as_if_it_were_alone():
    model, ids, tree = tiny_model("llama-gqa-tied"), random_ids(7), TokenTree([5, 8, 9, 3, 3], [-1, 0, 0, 1, 2])
    target = TreeTarget(model)
    with torch.inference_mode():
        target.read(TokenTree(ids[0].tolist(), list(range(-1, 6))))
        logits, _ = target.read(tree)
        for node in range(5):
            branch = [tree.token_ids[each] for each in path_to(tree, node)]
            alone = model(torch.cat([ids, torch.tensor([branch])], dim=1)).logits[0, -1]
            torch.testing.assert_close(logits[node], alone)
        target.keep([0, 2, 4], of=5)
        after, _ = target.read(TokenTree([6], [-1]))
        alone = model(torch.cat([ids, torch.tensor([[5, 9, 3, 6]])], dim=1)).logits[0, -1]
    torch.testing.assert_close(after[0], alone)


@pytest.mark.parametrize(("nodes", "branches"), [(0, 1), (1, 1), (4, 1), (6, 2), (9, 3)])
def test_trees_leave_greedy_text_as_it_is(nodes, branches):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    made = generate_tree(model, likeliest_tree(random_head(model), model, nodes=nodes, branches=branches), ids, 25)
    assert torch.equal(made.token_ids, generate_cached(model, ids, 25))
    assert all(step.drafted == nodes for step in made.steps)


def test_a_tree_with_the_right_branch_is_accepted_to_its_end():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    text = generate_cached(model, ids, 25)[0].tolist()
    read = []  # lengths of the text at each step

    def grow(hidden, token):
        read.append(6 if not read else read[-1] + 3)
        right, wrong = text[read[-1] + 1 : read[-1] + 3], (text[read[-1] + 1] + 1) % 97
        return TokenTree([token, wrong, right[0], wrong, right[1]], [-1, 0, 0, 1, 2])

    made = generate_tree(model, grow, ids, 19)  # one from the prompt, then 3 a step
    assert made.token_ids[0].tolist() == text[:25] and [step.made for step in made.steps] == [3] * 6


def test_likeliest_tree_is_a_chain_with_one_branch_and_prefers_likely_nodes():
    model = tiny_model("llama-gqa-tied")
    head, state = random_head(model), torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    chain = likeliest_tree(head, model, nodes=4, branches=1)(state, 7)
    assert chain.parents == [-1, 0, 1, 2, 3] and chain.token_ids[0] == 7
    tree = likeliest_tree(head, model, nodes=5, branches=97)(state, 7)
    with torch.no_grad():
        after = head(state, model.get_input_embeddings()(torch.tensor([7])))
        best = model.lm_head(after)[0].argmax()
    assert tree.token_ids[1] == int(best) == chain.token_ids[1] and len(tree.parents) == 6
