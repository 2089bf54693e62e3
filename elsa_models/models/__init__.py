from .elsa_swin import ElsaSwin
