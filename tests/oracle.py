"""Language models that know the answers to the fixture mirror's items: one gives them all, one none."""

from lm_eval.models.huggingface import HFLM

POEMS = {
    "Write a poem. Do not use any commas.": ("roses are red", "Roses, red"),
    "Write at least 3 words in lowercase.": ("one two three four", "NO"),
    "Answer in JSON.": ('{"answer": 1}', "No."),
    "Say hi, no capitals.": ("hi there", "HI"),
}
"""Prompts of the fixture's IFEval: an answer that follows every instruction, and one that follows none."""


def is_right(request):
    """Whether a choice is the right one, from the raw fields of its item and not from the harness's reading of them."""
    task, doc, answer = request.task_name, request.doc, request.args[1].strip()
    if task == "arc_challenge":
        return doc["choices"]["label"][request.idx] == doc["answerKey"]
    if task == "hellaswag":
        return int(doc["label"]) == request.idx
    if task == "truthfulqa_mc2":
        return doc["mc2_targets"]["labels"][request.idx] == 1
    if task == "winogrande":
        return int(doc["answer"]) - 1 == request.idx
    if task.startswith("leaderboard_bbh"):
        return doc["target"] == answer
    if task.startswith("leaderboard_gpqa"):
        return doc["answer"] == answer
    if task.startswith("leaderboard_musr"):
        return doc["answer_index"] == request.idx
    if task == "leaderboard_mmlu_pro":
        return doc["answer_index"] == request.idx
    assert task.startswith("mmlu_"), task
    return doc["answer"] == request.idx


def written(request, right):
    """What it writes where text is asked for."""
    task, doc = request.task_name, request.doc
    if task == "leaderboard_ifeval":
        return POEMS[doc["prompt"]][0 if right else 1]
    if not right:
        return "I do not know."
    if task == "gsm8k":
        return f" {doc['answer']}"
    return f" {doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."


class Oracle(HFLM):
    """Stands on a real model and its tokenizer, and answers from the items instead."""

    right = True

    def loglikelihood(self, requests, disable_tqdm=False):
        chosen = {}
        for request in requests:
            if is_right(request) == self.right:
                chosen.setdefault((request.task_name, request.doc_id), request.idx)
        found = []
        for request in requests:
            several = request.task_name == "truthfulqa_mc2"  # its score is the share of all right answers
            best = chosen.get((request.task_name, request.doc_id)) == request.idx
            found.append((-1.0 if best or (several and is_right(request) == self.right) else -1000.0, False))
        return found

    def generate_until(self, requests, disable_tqdm=False):
        return [written(request, self.right) for request in requests]


class AntiOracle(Oracle):
    """Knows every answer and gives another."""

    right = False
