"""A model that is served in a process of its own: `start(SERVER, tokens, domain, ...)`.

It says that it is ready, generates so many tokens for a text of each domain, a request of its name, once it is told to,
prints what its own lens has seen, and closes when it is told so.
"""

SERVER = """
import json, sys
import torch
import expert_lens
from expert_lens import demo

torch.set_num_threads(1)
model, tokenizer = demo.load()
lens = expert_lens.attach(model, name="served")
print("ready", flush=True)
sys.stdin.readline()
tokens, *domains = sys.argv[1:]
prompts = demo.prompts()
for domain in domains:
    with lens.request(domain):
        inputs = tokenizer(prompts[domain][0], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=int(tokens), do_sample=True)
held = {request: lens.routed_experts(request).tolist() for request in lens.requests()["request"]}
seen = {"tokens": lens.stats["tokens"], "counts": lens.counts().tolist(), "requests": held}
print(json.dumps(seen), flush=True)
sys.stdin.readline()
lens.close()
"""
