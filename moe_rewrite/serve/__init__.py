"""Serve LoRA experts as adapters: which one a prompt gets, and how an engine is asked for it."""

from .requests import lora_request as lora_request
from .requests import requested as requested
from .router import AdapterRouter as AdapterRouter
