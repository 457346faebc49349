# SPDX-License-Identifier: MIT
"""Tests and benchmarks of tentacle.py, in the order of its sections.

    make test                  all tests
    python3 test_tentacle.py   the benchmarks (make bench)

Real sockets, processes and TLS; tables for what is pure. Every test leaves no thread, descriptor or
child behind: a fixture looks.
"""

import ast
import atexit
import base64
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import pwd
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import zlib
from xml.etree import ElementTree

import pytest

import tentacle
from tentacle import LIMITS, Int64, UtcDate

for _name in ('HTTPS_PROXY', 'ALL_PROXY', 'NO_PROXY'):
    os.environ.pop(_name, None)
    os.environ.pop(_name.lower(), None)

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, 'tentacle.py')
OPENSSL = shutil.which('openssl')
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3

# Conversations of the original (Octopus.Tentacle.Client and Octopus Tentacle 9 over Halibut 8.1 on
# Linux), tapped inside TLS on 2026-11-21: their messages as raw DEFLATE, reduced to those that
# differ from each other (of the questions for a status only the last).
CAPTURES = {
    'listening-two-calls': [
        (
            'client',
            'dZG9bxNBFMSHiyNBqnRAgyJBgxTbu+fv6+LThVgKkr8gBaLYOz/sVe52j913FvdnUNKCqOj512hRHIOQJer3'
            'G828mToAjl6T92pNuA2A4AXXJaED4ErlOq24tXTK+NI6bk2dZZvZvDWnjxV53gvPz/YoAr3CDYBJrEqV6lyz'
            'Jr8gt9UZvQ2j6BXxv5cLX5vsnXx/1j7ryTALO5KaqvNh0OyGottUvdGoOZL9lQpVKodpH8cqY73VXE9WOAXQ'
            'ePb8fPbrW2P8/cvn4uuPJz+PyKxKqw1j9gAIpjbPtVnv084qqmipC7IV4xEAISIRRkIgmBO7+lp7JqPNepET'
            'lRPD5LYq/0uKSEic7sjYVoavdaEZxwCC2BpDGWtrEues2zGHRr2d0TIr41yT4b3kkJI7aqw8vXEaTwFsmEsf'
            'tdu5zVS+sZ4j2RVi2L4LXVim5aYq0tLd/fwSQJwM4lHS7YfhSAy6Igkvwr4MZXjZ74+Hg6QjxrFMxjLBydTZ'
            'TzVOLq3LaE7e5lu6sp7xcOJvKF3Y7JY4+VMnEPj7GfH4v/siKIg39n6bg6nRKJVThd8VBuA3',
        ),
        (
            'service',
            'dZA/T8MwEMVfUyYWxMCegbExjZsW0g1V4s+AikgVhorBca7IkhVbtoPUmU/AR+MboaBQBSFuu3v30713HyNg'
            '/EDei1fC+wiIzsPeEjIAd0Krqg1s40TjrXGBPToTjDSaPZG3pvHUk5O430WkajwDuF8JKyqlVVDkC3JvSlLJ'
            'l8tbCkPl2u8buU1f4ot4nnLJZyklYra7TDI+zRIxz/MkTxe14KJKr6oFjsk54zB25Fsd8ImD4S2AtQzGtp5t'
            'qAlCamIr0wQnZPBsePRX85Ok5JP4fx5HRWu7F1A9hLHuDExx0iUupFM29FkRpTjrpjdK0/cDd+QOGsfpH6Lk'
            '6OoL',
        ),
        (
            'client',
            'dZFBb9NAFIQHt5Wgp94QJ3LggoSTtRPsxLfGcmmkIqVJoAfEYWO/Jqvau2b3OcJCcObIf0BC/CLu/Ab+AGoa'
            'EIrE+X2jmTfTesDBS3JOrgg3HuA94bYm9AGcy1ItG+4urNSuNpa7U2vY5KbszuhdQ453wmedHQpPFbgCMEll'
            'LZeqVKzIzcluVE6vwyR5Qfzv5dS1On8TvO30Otf9IgquZd8Pi5j8wWgkfBnJoU9BNIqL4TAW8RJHMme1UdxO'
            'CpwAOPz6+MevT/6XybfvP9XHz/WHA9JFbZRmXN4DvKkpS6VXu7SXDTW0UBWZhvEAgBCJCBMh4M2IbXuhHJNW'
            'ejUvieqJZrIbWf4lRSICnGzJ1DSaL1SlGEcAvNRoTTkrozNrjd0y+0bPt0aLvE5LRZp3kn0q2FJj6eiVVXgE'
            'YM1cu6TXK00uy7VxnAQDIYa929CVYVqsm2pZ29ufnwJIszgdZYMoDEciHogsPA2jIAzCsygaD+OsL8ZpkI2D'
            'DMdTa963OD4zNqcZOVNu6Nw4xv2Ju6Ll3OQ3xNmfOgHP3c2Ih//dF15FvDZ32+xNjcNaWlm5bWEAfgM=',
        ),
        (
            'service',
            'dZC9TsNAEIQnDhUNoqB3QRkfthP5Jx2KxE+BgnBkiojifF6jkyzf6e6MlJon4NF4I2RkIiPEdruzn3ZmP2bA'
            '/IGs5a+E9xngXbqDJqwA3PFWVr1jO8M7q5Vx7NEop4Rq2RNZrTpLI7nwx114ssYzgPsN17ySrXSSbEHmTQoq'
            '4/X6ltxUubaHTuyjF//Kb5Z1EjV8GcR1SsEqz8OAJzwLKErytM6yNEwrnJIxymBuyPatwyeOhvcAtsIp3Vu2'
            'o85x0RLbqM4ZLpxl06O/mp8kZbzw/+dxUvR6eAHVUxjbwUCIsyFxIYzUbswKL8LFML2RLX0/sCFz1GKc/yHK'
            'GEN9AQ==',
        ),
    ],
    'listening-script-v2-exit7': [
        (
            'client',
            'dZFPb9NAFMQHt5Wgp94QcMmBCxJJ1v+S1D01lttGFJQmgR4Kh7XzSFa1d83uc4RPHPkgfFHUNCAUifP7jWbe'
            'TOsBB+/JObki3HuA95rbmhACuJKlyhvuLazUrjaWe1Nr2BSm7M3oW0OOd8K3nR0KTy1xC2CSylrmqlSsyM3J'
            'blRBn4IkuST+93LuWl3c+V86/U6cj4ZxGAfdaBgF3YjCvCtDX3YHo7jw8ygP5fArjmTBaqO4nSxxAuBwNv95'
            'N748+/Dr5frzq3fJjwPSy9oozbh5AnhTU5ZKr3ZpbxpqaKEqMg3jGQAhEhEkQsCbEdv2WjkmrfRqXhLVE81k'
            'N7L8S4pE+DjZkqlpNF+rSjGOAHip0ZoKVkZn1hq7ZfaN4q3RoqjTUpHmnWSf8rfUWDr6aBVeAFgz1y7p90tT'
            'yHJtHCd+JETcfwhdGabFuqny2j78/AZAmg3T0ywaBMGpGEYiC86DgR/4wcVgMB4Ns1CMUz8b+xmOp9Z8b3F8'
            'YWxBM3Km3NCVcYynE3dL+dwU98TZnzoBzz3OiOf/3RdeRbw2j9vsTY3DWlpZuW1hAH4D',
        ),
        (
            'service',
            'dZA/T8MwEMVfUyYWxMCegbExxElI1Q1V4s+AikgVhorBdq/IUhRbtoPUmU/AR+MboaBQBSFuu3v30713HxNg'
            '+kDei1fC+wSIzsPeEnIAd6LRsgts7UTrrXGBPToTjDINeyJvTetpIGfxsItIb/EM4H4prJC60UGTr8i9aUU1'
            'XyxuKYyVa79v1SZ9iS/iQs7LIit4kpc5T3LKZCKyVCRX80KlMpeZKHc4JueMw9SR75qATxwMbwCsVDC282xN'
            'bRCqIbY0bXBCBc/GR381P0lqPov/53FUdbZ/AW3HMFa9gUuc9Ikr5bQNQ1ZEKc766Y1u6PuBO3IHjeP0D1Fz'
            '9PUF',
        ),
        (
            'client',
            'dVPBbttGEH2mFaARisIF2kNuRFAEKBDRS0qWZBYNYKkSLCRubUuJD20PK3IqLULuMrtDxbr2F3LNocfecgl6'
            '6s1/0h7zD0VBUXZdo+VpZ/bNzpt5j08bwO4JOScXhK8bgPcFrwtCG8CxzNS85GBmpXaFsRycWsMmMVlwTq9K'
            'crwtfOxvofBUihMAk2liVcFTsiuV0IsojqcsLdfZI7fWyffhj/6+H6VJWxy2u62fKEpbnb7st+bdNrVo3p73'
            'IylEOO/gnkxYrRSvJyn2ADS6969arb9+Pf7tyYevfv5l5/0u6bQwSjPOdgDv1GSZ0ostx7OSSpqpnEzJuA9A'
            'iFhEsRDwzont+plyTFrpxTQjKiaaya5kdoMUsQixt0EOTan5mcoV4x4Ab2i0poSV0SNrjd1gZncaHWwazZJi'
            'mCnSvC25iwo3qIF09NwqPACwZC5cvL+fmURmS+M4DjtCHOxXpHPDNFuW+byw1cxfAhiOesPDUacbRYei1xGj'
            '6CjqhlEYjbvdQb83aovBMBwNwhGap9ZcrtEcG5vQOTmTrejYOMZHE3dB86lJXhKPrtcJeK6WEJ/+h6rwcuKl'
            'SfExgFsCo1FIK3OHDzvArsCflSq1r34A8F3CpihdMCPNMskoGBrNVibsgjsNgluPDk2eS52+iB77//8Admvw'
            'TFVz4FE1wUy6l5MUnwNwKnn6an75fD0ueme9s0VfvF4AXl0zMOkaFwAoWRo/U5p8o6n5T8SvTR09rMOlJfL/'
            'ePvGv/pdX71LTEoP63s2vuOUrPWfPIqadKnY7zVviHxSLYvsimyVcK0Q3jellZWPZuZCKh4bu53CjJVWbnnb'
            'jAfYmziTbeCovi37m+RJyXR5bbDPAESdIBJxO4yjdtDt9ISovPZv+Lcypw2v81JvfoVaxu0y3cbuaIxVRtfn'
            'I7soc9LXdxWTvwE=',
        ),
        (
            'service',
            'lZNNT1NBFIZfuBADboiJC01MJsFYTOgHbYWWHSF8Kd8tuiBo5s49lAmXmTJzLm0XLv0Fbt2YuDdx48Yd/0R/'
            'h4m5LTTWWMTZzcd58r7nPXM2DgRb5L1sEN6MA6OPudMklAGsy1iHCefqThrftI5zu86yVTbO7ZNvWuPpqnJW'
            'XL3FqI6wBWCjppxuco3chVb0sri4WGPpuHe65DtGHc4dibwoRqpUqJbms8dUjLLliqxkw/kSZSkshZWiLBTm'
            'wjImyTnrEDjyScz4OtaX+RrAjmLbTHyuToaliim3bA07qdjn/hBxvWfJib+28LI4K4YjENS1OiXGEwCjdelP'
            'NyLcB+C1enEetg86q82FvYW9RqXQagBjm7bh8SMAggLWAEzVbOIUIV0TO0olzlGEyqfZnx9HUiC1GQ8BTE/b'
            'noZDz5FNOHtBLrSejoBgDq2hpOoA6TmAJXWeaKdNQ2hvY8naGnGWMLXFfmKMNo1eE0RL84nYthv9R9qItFPk'
            'Upc+OwcExRs8VP/tIaJjmcSceih1tV2TRgdIawOkRwBW2qQSlmFMItKOFFvXEdqLfKgNEJRxMBS2PgCbGYQZ'
            'eUbCOnGcxLFoSj5Z7CLzofQnQPAMX27JfQegO9Bpn/sIoY1oWXeaHkZ93Zm8dxd5vhqt/CvrTvN/m56MSHxa'
            'mTkwWtmIxMxBfTVbeZoRZJSN0ivXS1BILzLOWs4AwTzmh2a0OSB6AkCsDQlrCAgW/r+QWxYIKli9ZeGDfuGJ'
            'IxLfP7wXl9/M5efUHhBUsfAbaOQG0CQAtsJzRM6lX6KAt0Oj2hoo3QWw66wi35ufflK3jEVQWzNFvf/SzSUV'
            'fW+b2rxpGzU6T8gowt1uI1JJLLmnaGqlrXk5tXqnd/kL',
        ),
        (
            'client',
            'dZKxbxMxGMUfl1aCMrQdGNiiCiEhNYnvmuSS25rTVY0oImmu7YAQcpyvidU7+2r7QvOPIJaOTKyMzPxB7Ego'
            'aUBqBV79+957n5+fVoDKG7KWTwm/PMB74RYF4QDAMc/kuHT11HBlC21cfWC000Jn9VO6Lsm69eB+dY3CkxMM'
            'APRHwsjCjcjMpaDzIIpinRcZObq7OLQLJd4F76uN6liMm+wybNe6bd+vNTstVuPjIKgd8FYo2pdBt9OdYJML'
            'J+fSLfoT7ADYmG9/+777aXD8dS+6+PHz822F1KTQUjkMHwHeQGeZVNN1zGFJJaUyJ106PAHAWMSCiDF4p+TM'
            '4kRaR0qq6SgjKvrKkZnz7C/JIuZjZ0XGulTuRObSYROAF2ulSDipVWKMNivmoVFrZZSKIs4kKbceSR9Q/orq'
            'cUtnRuI5gJlzhY0ajUwLns20dZHfZKzVWIbOtaN0Vubjwix3fgUgTsK4mzTbQdBlYZMlwWHQ9gM/OGq3e50w'
            'OWC92E96foKtgdE3C2wdaSPolKzO5nSsrcPjvr2g8UiLK3LJn+cEPHvXInb/USy8nNxMT7C9jHCvY2wU3PDc'
            '4guACsPtUuvud30A8FY4XZS2npJyXGRUj7Vyhgtn6w886vd1Y53nXE3Og/3q/zVQSeVyD7xcuqbcXvUneAbA'
            'SvH6enxztjgqwmE4nHbYxylW5zc=',
        ),
        (
            'service',
            'Lcu9CsIwFIbhD916FR0cTbWxP9ZNXHQQRMVFHNL0VAqxCSep4DV5Bd6dg87v834AjPfkvboT3gBGk/ByhAzA'
            'VpmuHkJyZtV7ZzkkB7bBamuSI3lne0//cxr/LUZdgwOA3Ulz58KJ+NlpusjVamMfzlCgX1j7V6+v8hbP4lrX'
            '2bwtC1EVaSqyZT4XqpZSLFRe6qKV1bJqEBGzZURMfjABwBc=',
        ),
    ],
    'listening-script-v2-long': [
        (
            'client',
            'dZHNbtNAFIUPbitBV10goe6yYINEkrHj/Ni7xnJppFZKk0AXFYuxc5OMas+YmesIPwxvgMR7wOPwAKCmAaFI'
            'rO93dM49p/GAoxtyTq4JDx7gveamIvQAXMlCZTV3FlZqVxnLnak1bHJTdGb0qSbHe+Hb1h6Fp5a4AzBJZCUz'
            'VShW5OZktyqnD0EcvyP+93LhGp3f+x9b3VaeBaKf5bK9Wq167XApV22Z+2HbjwZ+bxT2o2UvwonMWW0VN5Ml'
            'zgAcf79v/fj569vN15fncpR+iY5ILyujNOP2GeBNTVEovd6nva2ppoUqydSMFwCEiEUQCwFvRmyba+WYtNLr'
            'eUFUTTST3criLyli4eNsRyam1nytSsU4AeAlRmvKWRmdWmvsjjk06u+MFnmVFIo07yWHlL+jxtLRe6twDmDD'
            'XLm42y1MLouNcRz7oRDD7mPo0jAtNnWZVfbx5zcAknSYRGk4CIJIDEORBhfBwA/84HIwGI+GaU+MEz8d+ylO'
            'p9Z8bnB6aWxOM3Km2NKVcYznE3dH2dzkD8TpnzoBzz3NiFf/3RdeSbwxT9scTI3jSlpZul1hAH4D',
        ),
        (
            'service',
            'dZC9TsNAEIQnCRUNoqB3QRmb+CcIp0OR+ClQEI5MEVGcz2t00sl3ulsjpeYJeDTeCBmZyAix3e7sp53Zjwkw'
            'eyDvxSvhfQJMz3lvCRmAO6FV1XG0daL11jiOHp1hI42Onshb03oayHkw7GKqajwDuF8LKyqlFSvyBbk3JalM'
            'Vqtb4rFy7fet3MUvwUUgq2SxrKQIm6ZJw6wWTShknIVxfhmnV9kyr9Mcx+SccZg58p1mfOJgeAdgI9nYzkdb'
            'allITdHatOyEZB+Nj/5qfpKUyTz4n8dR0dn+BVSPYWx6Awuc9IkL6ZTlISumMc766Y3S9P3AhtxBS3D6hygT'
            '9PUF',
        ),
        (
            'client',
            'dVLBbttGFJzQCpAKReEEQdAcAuhQoC0Q0SQlixKBHiyWagTEjS0xCYIkh9XyWVqY3GV3l4L1JT301GsvBXrp'
            'qede8gH5gf5DjgEp2XCNZE+Lt/Pem9mZey1g75iMYUtCqwU439hNSegBeMJysaism2omTam0dU+0soqr3J3R'
            'LxUZu2t83NlB4YgMxwCmc65Faeek14LTiyCK5pZpu60emY3kr/23nYMO58xnZ72su8hGi27/jIfdRegPu3R4'
            'NsyGozAY+gPcZtyKtbCbaYZ9AK0f/vz93W///Pvs76//+/D+1+8e7JHMSiWkxektwDlReS7kcsfxtKKKUlGQ'
            'qiy+AOB5kRdEngdnRlZvngpjSQq5nOdE5VRa0muWXyG9yPOx3yBjVUn7VBTC4jYAJ1ZSErdCyURrpRtMemPR'
            'YbMo5WWcC5J213IT5TeoMTP0XAs8BLCytjTRwUGuOMtXytjI73teeFCTLpSldFUVi1LXmr8HECdhPEr6gyAY'
            'eWHfS4KjYOAHfjAZDMbDMOl549hPxn6C9olWFxu0J0pzmpFR+ZqeKGNxZ2pe0mKu+DnZ5PI7AcdsLcTdT7gK'
            'pyC7Uhm+BHDNYLRKpllh8NctYM/DH7Ur21y9AfCMW1VWxk1JWsZzcmMlrWbcGvfGAvfa0FgVBZPZi+Bx5/MD'
            'sLcFp6LWgW9rBSkz59MMDwC8OrrolbNXozj5qV9M/bE4D+JTwNk2jVW2wSMAxFeqs6ClkG1Th6ITtpsSyax9'
            'Ne+rWjPpNem6YLo+nB8rzeo4pOolE3ai9I6MmggpzOp6pg6xPzUqb+Coz47DVfG4snRxmZP7AIK+G3hRz4+C'
            'njvoh55XR+b/8J9ZQQ2vWSWbRG/d2P2JaVKL1kTkdHk/0suqIHn5VjP5CA==',
        ),
        (
            'service',
            'jZLNa1NBFMVP84qiK3HhQhBGKqRCk2eSfqTd1VBrpB/apJVSKsybd5MOeZ1JZ+60CXbtQjf+C4J7F/59gryk'
            'rUSMOquZO3N/nHPmxrNAtE3eyy7h8SxQeMLDPmERwEuZ6SRwue2k8X3ruPzaWbbKZuU98n1rPF11Loirtyjo'
            'FNsAmi3ldJ9b5M61ooPq2lqLpeNxdd0PjTqqHItYKCUrslNLS0m6mpQWO2qllKxU6iVa6tTT+upKtV5Zxl1y'
            'zjpEjnzIGMPoRuY7ALuKbT/4cpsMS5VRuWENO6nYl38TcX1mycFfWzioLojpCERtrXrEKAIotKXvNVM8AHC4'
            'Pqj19w5XGxubi6fNynPdqzbeALNbtuvxtQBEz7AJ4F7LBqcI+bqzq1RwjlK8/7bw48tMTqQB4yGAuTk7FnHk'
            'ObWBS+fkEuvpGIgquJhKupwgvQKwrs6Cdtp0hfY2k6ytEaeBaSD2gjHadMcpiAvNJ2LHNm8eaSPyqMjlNn2p'
            'AkTVv3i4/LeHlDoyZJx7qI20XZMKE6SPE6RHADYGpALLJCORakeKrRsK7UWcaANEi9j/T9j8JMzIUxLWiU7I'
            'MtGXfLI2QsaJ9CdAtITvU7mfJrgfAIwmOs/5BpFHeGFdLy/+0l2MvTuP+Wq24rfW9eI/jk9RBJ+3FveNVjYl'
            'Mb/fflGqPy0KMsqm+ZUbf6GQXhSdtVwEomXUpn7S5wnVtwAk1M0zxP0dGvCW7bboLJBRhNuj1hzEkgkz+XZj'
            'oLlh0zEVwE8=',
        ),
        (
            'client',
            'dZKxbhNBEIZ/7ERAaAIFUjoXSAgptu8uji92Z58uiYURsX0ERYhivZ7Yq9ztHrtzVixehBdBNCBR8R4peQAa'
            'KmTHCVIE0430zf/P7L87ZaD8ipwTU8KjMlB6xoucsAfgWKRqXHAtsUK73FiunVjDRpq0NqQPBTleD+5W1ihK'
            'aoKXAHojaVXOI7JzJek0aLePiEcsuHAdt9DyXfi+Uq+ci9aB9KhVJb85qTb8sayOQ/Kr+75sNoPAC8fn+9gU'
            'ktVc8aI3wTaAjZ/fP/3Orr52vlwNfowrH3+VSU9yozRjcA8onZg0VXq63nBQUEGJysgUjIcAPK/tBW3PQ2lI'
            'bBd95Zi00tNRSpT3NJOdi/SW9Nqej+0VGZlCc19lirEJoBQZrUmyMjq21tgVk9wx2l8ZJTKPUkWa1yN3KX9F'
            'dYWjN1ZhB8CMOXftej01UqQz47jtNzwvrC+XzgxTMiuycW6XN78AEMVh1IobzSBoeWHDi4NO0PQDPzhsNrsH'
            'YbzndSM/7voxtk6suVxg69BYSUNyJp3TsXGMBz33lsYjIy+I45vnBEruOkA8/kemKGXEMzPBFoDbeLGRCysy'
            'h28Ayh4+L2Wu/9R7AK8lm7xwtYQ0C5lSLTKarZDsanfkb/qV6jrN02C38n8FlBO1PADPl56JcBe9CZ4COOtc'
            '7uXDs1YUHzWynt9VF0E0AJ70heO+mY6W4loS7uNv/QE=',
        ),
        (
            'service',
            'dY9NTtxAEEa/2GxghVhk3YtI2czYY2d+MuyIhWAUCD+2iFCUSO12MbRm6DbdZWI2XIEzcI0cgZskd4gUDQxR'
            'iJLalVSv9F4WAOE+eS+nhEEABK/4uib0AezKuS4bjgonja+t4+jQWbbKzqNj8rU1npZkRyxvEegK7wFMcuV0'
            'zTm5K63oJN3c3CHOWXLjt/y1UZ9Gn0UszuT4rerRuEvJsOr2k1J1yxEl3UGihsM07Y3KswHWyDnrEDryzZxx'
            '++K35BcAB4pt3fioIMNSzSnKrGEnFfvoL4Wn/UHiKeAk7Yj/v0BYaDUjxmsAQSH9bFLhJYDTrfZNfXw6zrZ3'
            '+heT5J2epdkRsLJnpx7fAIQ9JADWc9s4RVjM6oFSjXNU4ft95+fdIqOglrECgEwFhAlu/mCCZ8yPZ8wRgENn'
            'FXkv4lKbuJT+XGgjYu+uYl6GxB+tm8X/dBXUaqZKfNV8LpStSPQAbHyglvfsNKfLhowirD6YL5xY8qPS+nar'
            'ObPVYxSAXw==',
        ),
        (
            'client',
            'dZLRahNBGIWPmxa0CNYbwQshoCBCs9ndpJvs3jXLxgYqpslaKSIymf1thu7OrDOzoXkLb7zVO/FFfAl9Ai98'
            'BZGkUWjRuZ3vP+f8c+Z2A2g8I2PYGeGXAziP7LIidAAcskLMautmmklTKW3dsVZWcVW4E3pXk7Gbwb3mBoUj'
            'cowBjKZci8pOSS8Ep5MgjhNVVgVZurw4MEvJX/VfN9vN6G20T3k+a/l52Gl1Q77fYn2KWmE/Z71+5AWdboht'
            'xq1YCLsc5dgFsPX954dP/MHX4Zcf828X7x8OGyTzSglpcXwDcMaqKIQ828Q8rqmmTJSkaotbADwv9oLY8+BM'
            'yOrlkTCWpJBn04KoGklLesGKv6QXez5212SiammPRCkstgE4iZKSuBVKplorvWauG+2vjTJeJYUgaTcj2TXK'
            'X1MDZuiFFrgPYG5tZeJ2u1CcFXNlbOx3Pa/XXoUulaVsXpezSq92fgIgSXtJlHbDIIi8XtdLg4Mg9AM/GIbh'
            'oN9LO94g8dOBn2JnrNXFEjtDpTlNyKhiQYfKWNwcmZc0myp+Tjb985yAYy5bxN1/FAunJDtXOe6sIlzpGFsV'
            '06w0+Ayg4eHjSuvyd70B8JxbVdXGzUhaxgtyEyWtZtwa95qHe1U3UWXJZH4S7DX/r4FGJlZ74PHKNWPmfJTj'
            'HoDTg4tONTmNkvRptxz5A3EeJMdYn98=',
        ),
        (
            'service',
            'Lcs7DoJAFEbhP9ixCgpLQeUl0BkbLUyIGBtjMcxcDQkykzuDCWtyBe7OQuvznQ+A2ZGsFQ/CG4A3d5MhpAD2'
            'ou/a0UVnFoM1ml1Us3Za6j46kTV6sPQ/F8HfwusUagCHRnJnXEP86iRd4qra6afpydEvbO00yGtxC5ZBeS8z'
            'UqoN1ypPwjSXWSgKKsO8UGJTlKs4SXP4xKwZPpMdewfgCw==',
        ),
    ],
    'listening-script-v2-cancel': [
        (
            'client',
            'dZHBbtNAGIQHt5Wgp4gL4tYDFySSrDduTHyisVwaqUhpEugBcVg7v5JV7V2z+zvCr9Hn4MANIV4DXoAnQU0D'
            'QpE4/99o5p9pA+DgDXmvVoSbAAiecVsTBgAuVKnzhnsLp4yvrePe1Fm2hS17M/rYkOed8MXJDkWgl7gGMElV'
            'rXJdatbk5+Q2uqB3MkleE/97OfOtKd6HH076J7lYRsvTOOqOJMluNAhFdyRV0c1HeT6IQ5nHkcCRKlhvNLeT'
            'JToADvnnjy+/bjvp7edv3+PHX18dkFnWVhvG1QMgmNqy1Ga1S3vVUEMLXZFtGI8ACJEImQiBYEbs2kvtmYw2'
            'q3lJVE8Mk9uo8i8pEhGisyVT2xi+1JVmHAEIUmsMFaytyZyzbsvsG51ujRZFnZaaDO8k+1S4pcbK01un8RTA'
            'mrn2Sb9f2kKVa+s5CSMRiv5d6MoyLdZNldfu7ufnANIsTkdZNJRyJOJIZPJMDkMZyvPhcPwyzgZinIbZOMxw'
            'PHX2U4vjc+sKmpG35YYurGc8nPhryue2uCHO/tQJBP5+Rjz5774IKuK1vd9mb2oc1sqpym8LA/Ab',
        ),
        (
            'service',
            'dZA/S8RAEMXf5axsxMI+heVlTfYiIdfJgX8KOTFHLA6L3c0oCyG77G6Eq/0EfjS/kUTiERGnm3nzY96bjxkw'
            'vyfvxSvhfQZE52FvCTmAW9Fq2Qe2daLz1rjAHpwJRpmWPZK3pvM0kot43EWkGzwBuFsLK6RuddDkK3JvWlHN'
            'V6sbClPlyu87tcue44tYpk3eXBZ5UnLiSb7M0qTkQiWylHJZZFwWeYpjcs44zB35vg34xMHwDsBGBWN7z7bU'
            'BaFaYmvTBSdU8Gx69Ffzk6Tmi/h/HkdVb4cXUDOFsRkMpDgZElfKaRvGrIgynA3Ta93S9wNfyB00jtM/RM0x'
            '1Bc=',
        ),
        (
            'client',
            'dZLBbhNJEIb/TAxiDUJBAq1yswQHkPCkZ+yM8dxixxZGyZLYAxyAQ7td2C3PdM9291h434In4BkQp7wBj8Mj'
            'oBk7UTaCPrWqv6r6q+vfrwG7p2QtnxPu1gDviVvnhBaAlzyV08L5ieHK5to4/8xop4VO/TH9W5B128TnjS0K'
            'T85wCmA0EUbmbkJmJQW9DeN44rhxm+iRXSvxPvjYOGhMWyzo8ChoBl3xotkWIWtOu91PzeCwFbGoG0TTTwy3'
            'uHByJd16NMMegBr/b+f7j/3GycXXR9HtL8ufu6RmuZbK4XwH8M50mko132o8L6igRGakC4e/ADAWszBmDN6Y'
            'nFmfSOtISTWfpET5SDkyK55ekSxmAfYqsq8L5U5kJh1uAfD6WikSTmo1MEabikluNDqsGiUi76eSlNum3KSC'
            'iupxS2+MxD6AhXO5jQ8OUi14utDWxUGbBeygFJ1pR8miyKa5KWd+BqA/6PS7g3YUhl3WabNBeBRGQRiEwyjq'
            'vegMWqzXDwa9YID6mdGf16gPtRE0JqvTFb3U1uHOyL6j6USLJbnB5XcCnt2sEA9+s1V4GbmFnuEegGsLRi3n'
            'hmcWFzvALsO3nStffQDwWjidF9ZPSDkuUvL7WjnDhbP+jQb+taJ9nWVczd6Gzxt/LoDdDZzIcg48LSdIuF2O'
            'ZvgbwHhm3ejV6EwsqfdqmR1P3yST1jngbbJ6erbGYwAkFrphy95Szeu2NEajxepVWNGKTP2q7P1ydDIrMmXA'
            'NgN4x4XhpSsS/Y5LN9Rmq0kPpZJ2cd1ah9gbWZ1WOMqzVXIVPC0cfb60y0MAYdsPWdwK4rDlR+0OY6Vz/o//'
            'wzOqdI0LVRl7s5Tt19jKvKgNZUqX9yMzLzJSl2+lkl8=',
        ),
        (
            'service',
            'jZJNT1NBFIZfekkMrowbExOTSTAWE/px21IoO0TUEr6kLS4IJnPnnpZJLzNl5lwoGxPZuNaVW3f+AP+OP8XE'
            '3LZgaqw6q5kz5zx533NObR4Idsl72SM8mQdyj/lqQKgBeCUTHaVcbDtp/MA6Lh44y1bZpHhIfmCNp0nlspjk'
            'Iqdj7AJotpTTA26Ru9CKjirr6y2WjsfRDX9l1HF4IkoiqpbDVVkPC2FDrRVqqlIuRI1GtxCuVOvleiOsR90y'
            '7pJz1iFw5NOE8S64lfkWwL5iO0h9sU2GpUqouGkNO6nYF38TcfNmyam/sXBUWRazEQjaWvWJsQQg15a+34zx'
            'AMBh7Lm53TxQfXq23T97HnXareprYH7H9jy+5oCgjJcA7rVs6hQhOwv7SqXOUYz335d/fJnLkDRkPASwuGjH'
            'Ko49xzblwgW5yHo6AYIQlzNJ11OkbQAb6jzVTpue0N4mkrU14ixlGorD1BhteuM2iEvNp2LPNm+TtBFZr8hl'
            'Pn0hBILKXzxc/9tDTF2ZJpx5qI603ZByU6SPU6RHALaGpFKWUUIi1o4UW3cltBelSBsgqKHzn7ClaZiRZySs'
            'E900ScRA8un6CFmKpD8FghV8m8n9NMX9AGC00lmfbxFZCy+t62fBX7rzJe8uSjxZrtIb6/qlP+9PXqQ+q813'
            'jFY2JrHUab8orD3NCzLKxtmXG89QSC/yzlrOA0Ed9ZlT+jwlewGAn8gGcH+Phrxjey06T8kowp1RdcZiyYS5'
            '7Lo11Lxp4zEYwE8=',
        ),
        (
            'client',
            'dZJNbhNBEIUfdiIgsAgoEgIJyQskQIrtnvH4J14lNhPiYIR/JmGBshj3lOyWx91Dd42FD5HrsOQ6XAPZcYIU'
            'Qe1K+uq9qn79qggUP5Nz8ZTwtAgU3vAqI9QAnMWpmuRciWysXWYsVwbWsJEmrYzoe06Ot4OHpS2KgkrwCUBv'
            'LK3KeEx2qSRd+u32R+Ixx5y7E7fS8lvzqlQtBcJvikmtXm54XlAOhBeUW0ndKweilfiJl1AzkNiNJaul4lUv'
            'wT6AnfqTt8cH8cHx9fD4uvz6d79IOsmM0ozhA6AwMGmq9HS74TCnnCK1IJMzHgMQoi38thAojIjtqq8ck1Z6'
            'Ok6Jsp5msss4vSNFW3jY35Bdk2vuq4Vi7AIodI3WJFkZHVpr7IaJ7hnVN0aRzLqpIs3bkfuUt6E6saMLq/AS'
            'wIw5c+1qNTUyTmfGcdsLhCeq66UXhima5YtJZtc3vwfQDZvdozBo+P6RaAYi9E/8hud7/mmj0Wk1w5rodL2w'
            '44XYG1jzY4W9U2MljciZdElnxjEe9dxXmoyNnBOHt88JFNxNgHj2j0xRWBDPTII9AHfxYieLbbxw+AWgKPBz'
            'LXPzp64AfJFsstxVItIcy5QqXaPZxpJd5Z78bb9R3aZ56R+W/q+AYqTWB+Dd2jOK3byX4AWAUeK4d94byDl1'
            'zueLD5OLaFwbAs/7seO+mY7X6loSHuJv/QE=',
        ),
        (
            'service',
            'dY8/T8JQFMUPoDFxMi6uHRwcaG1LEcKmYLSIirSyGE3Kezekae2r790aGP0EfkC/jKkBBxO3c++5f37nswG0'
            'bsmYZEn4aADNY16XhADAdZKni4qdWCeFKZVmZ6oVK6FyZ0amVIWhzWbb2syimUrcAAgjodOSI9LvqaC5Pxhc'
            'EUeccGXOzboQT71n69QKXL/nLjpd+8zzAjtwvcDuy65nB25f+tKT1AsE9klrpdHSZKqc8YVfyBcA94JVWRkn'
            'poITkZMzVAXrRLBx/iBs6x+IbYC537b+P4FWnIqMGCf10zgxWShxBGAmDYfjcCoyuhhnr6PFYxx1HoCdiVoa'
            '7ALA4R2teKKWEb1VVAjCXt0FcFATEBq1vFylPFSSNha+AQ==',
        ),
        (
            'client',
            'dZJNbhNBEIUfdiJIJKSQDWKB5AULkGK7Z+z4bxcPE8WRCY49CQuURbunbDee6R66eyx8CMSCu7BE4gBcgMuA'
            '7BiILOhl66v3qupVqQgUX5G1fEo4LAKFZ26ZEWoAzngix7mrRIYrm2njKgOjnRY6qQzpfU7WbQqPShsUBRnj'
            'AkBvJIzM3IjMQgq69judgCtBye33iV0q8bZ1U6qWJpPjWMQ1vyy81qRcJy8ut+LGpMza7VqTNf0Gjzl2uXBy'
            'Id2yF+MAwI7//ebnp29PLz7qvc+ZefejSCrOtFQOl/eAwkAniVTTTZOXOeUUyZR07rAHgLEO8zuMoTAkZ5Z9'
            'aR0pqaajhCjrKUdmwZM/JOswDwdrMtC5cn2ZSoddAIVAK0XCSa1CY7RZM9tGx2ujSGRBIkm5Tck25a2pLrd0'
            'ZSSeAJg5l9lOtZpowZOZtq7j1ZnHqqumU+0omuXpODOrmV8ACMJm0A7rDd9vs2adhf6J3/B8zz9tNLqtZlhj'
            '3cALu16I/YHRH5bYP9VG0JCsThZ0pq3Dg559Q+ORFnNy4e91AgV7myEe/SNWFFJyMx3j4aqFOwljJ+OGpxZf'
            'ARQZvqyUbi/rBsBr4XSW20pEynGRUCXQyhkunK1sOVTuqgY6TbmKr/2j0v8VUIzkagY8X3lG3M57MR4DGMbW'
            '9c57AzGn7vk8fTm+ika1S+Cwz63r6+lodS5KEO7j7/sF',
        ),
        (
            'service',
            'zZK7bhNBFIZ/e2lIQ0RDhTQFBYW960tInHRgIsVRiE12CQUCaTxz1h7tZmaZORs7XXgDXoEaHhEkZHlBApGe'
            'U527vnN5HAHRKwpBLggPIqD9hG8qwh6AE1maec1x5qUNlfMcz7xjp1wZX1ConA3UVHZEk4u20TgHMEmVNxWn'
            '5K+NosvB0dFYWkXl1v083Fj1bvReJCLPn2mlh4Ou6o/y7h71dXek9/Nu7/BweNA7GOxLLbFD3juPyFOoS0be'
            '/s35AcBUsavqEGdkWaqS4rGz7KXiEP9FETc2S67DrxkuBx1xdwtEmVEFMZ4CaGcyFBONRwAudODJ6WSmCnpx'
            'Wly9nL/J0uFr4N6ZWwR8bgFRD58A7Kau9orQBnB/qlTtPWl8/d758aW1aUlrRgYgXcmydCtjF2JakZdsnN0u'
            'jfTxWlG1cYjV0pQkVtLwJjF3XpQysHC54CWJyjtFIQhXc1VzDET9/4BhgNs7Gb79wZACmDX1ydzYZC7DUhgr'
            'kuCvE26uk7x1vkj+fQBBa8OkxcrwUiinSXT7AB6e05rP3CKljzVZRdjBVnY3z0BobdTjteGx09SE8BM=',
        ),
        (
            'client',
            'dZKxbhNBEIZ/7ESCSKCQBtG5AAmk2L47m4vtAik+LoojA4l9CQVKsd4b2Svf7R67cxZ+A3pegooyoqLgaXgM'
            'ZMdAFMGWq2/+f2b+qVWB6mtyTkwJe1Wg8oSXBaEF4FhkalJyI7FCu8JYbpxaw0aarDGiDyU53hTu1zYoKirF'
            'GwCDsbSq4DHZhZJ0EfR6kdCSsuvvQ7fU8n33stasBS8moUfhpN5tTTr1tqROvdMJ07oM2h1BLQpJdLAtJKuF'
            '4uUgxS6ArfmDq6ffPv8cfsp/HH99qb9USaeFUZpxdgeonJosU3q6afKspJISlZMpGfcAeF7PC3qeh8qI2C6H'
            'yjFppafjjKgYaCa7ENkf0ut5PnbXZGRKzUOVK8Y2gEpktCbJyujYWmPXzG2jF2ujRBZRpkjzpuQ25a+pvnB0'
            'bhUeA5gxF67XbGZGimxmHPf8tud7zVXTuWFKZmU+Kexq5ucAovgg6sbtMAi63kHbi4PDIPQDPzgKw37nIG55'
            '/ciP+36MnVNrPi6xc2SspBE5ky3o2DjG3YF7R5OxkXPi+Pc6gYq7zhAP/xErKjnxzKS4v2rhRsLYKoQVucN3'
            'AFUPVyul68u6BPBWsilK10hIs5AZNSKj2QrJrnHLoXFTNTJ5LnR6EezX/q+AaqJWM+DZyjMRbj5I8QjAKHU8'
            'OBmcyjn1T+b5q8l5Mm6dAXtD4XhopuPVuWhJ2MHf9ws=',
        ),
        (
            'service',
            'dY8xT8JQFIUPoAuTcXHt4OBAqynYFDZFE0oQkVYWo8nr6w1pWvvqe7cGdn+Bf88fU9MIDiZu95ycc+93P1tA'
            '546MEWvCRwton/K2JAwATESexhU7kRaFKZVmZ6EVK6lyZ0mmVIWhXbNn7bJopwnmAIJQ6rTkkPR7KmnljkZj'
            'UUjKf+wrsy3k0/DZOrfcy9i7IC+2h/3YtweSfNv3vcSW7sAX1CePhI8uaa00OppMlTO+8Mv5AuBesior40RU'
            'sJA5OWNVsBaSjfOHYq9ZcGX2P6zcnvX/CnSiVGbEOGuORsJkQYITAMvEcDANFjKj62n2ehM/RmH/ATiYqbXB'
            'IQAcz2nDM7UO6a2iQhK6jQvgqCEgtJvxdpPyWCWEuq5rAN8=',
        ),
        (
            'client',
            'dZLBbtNAFEUvSStBF1BWiF0WSIDUJLaTJsS7xrhqqiLSxC0SCKHx+LUZxZ4xM88R+Q82SEgs+QOQ2PBF/ANK'
            'GpBawXrOu/e+ue9uHai/IOfEJQF1oPaIlyWhA+BI5CqtuJVYoV1pLLfG1rCRJm9N6H1FjjeDe40NiprKcApg'
            'NJVWlTwlu1CSzoMwjExR5sR09XDgllq+8b23jXZjMOh1g37aawYXqWh2O/uimfb3u830otOhbNDtpQOJbSFZ'
            'LRQvRxl2AWx9e5x9+tF+HX1PfnZ+fZx/rpPOSqM04/QWUBubPFf6cpPztKKKElWQqRh3AHhe6AWh56E2IbbL'
            'E+WYtNKX05yoHGkmuxD5X9ILPR+7azIyleYTVSjGNoBaZLQmycro2Fpj18xNo/21USLLKFekeTOS3KD8NTUU'
            'js6swkMAM+bShe12bqTIZ8Zx6Hc932uvQheGKZlVRVra1c5PAURxPxrE3V4QDLx+14uDg6DnB35w2OsNn/Xj'
            'jjeM/Hjox9gZW/NhiZ1DYyVNyJl8QUfGMW6P3CtKp0bOieM/3wnU3FWNuP+PZlEriGcmw71VhGslY6sUVhQO'
            'XwHUPXxZaV2d1zsALyWbsnKthDQLmVMrMpqtkOxaNzxa13UjUxRCZ+fBXuP/GqgnarUHnqxcE+HmowwPAEwy'
            'x6Pj0VjOaXg8L56nZ8m0s7pZAL8B',
        ),
        (
            'service',
            'Lcu9CsIwFIbhj7p5FR0cTdU2ttRNXHQQ/MNFHJL0KIXYhJNU8J68Aq/OQef3eT8ABlsKQd0JbwDJKL48QQJY'
            'K9vqPmYnVl3wjmO2YxedcTY7UPCuC/Q/x+nfImkb7AFsjoZbH4/Ez9bQOV8sVu7hLUX6hWV4deYym17TSVrX'
            'pcwrXYr8ppWQxVwJXc2l0LeioKaWpa4NhsTsGEOm0NsI4As=',
        ),
    ],
}


# ---- Helpers -------------------------------------------------------------------------------------


def eventually(condition, seconds=10):
    """Wait until a condition holds; its value. Fails when the time is over."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        pause.wait(0.01)
    raise AssertionError('it did not come true within %g s' % seconds)


def children():
    """Process ids of our children, zombies included."""
    found = set()
    for task in os.listdir('/proc/self/task'):
        with contextlib.suppress(OSError):
            with open('/proc/self/task/%s/children' % task) as file:
                found.update(file.read().split())
    return found


def memory_kb(pid, field='VmRSS'):
    """A field of /proc/PID/status in kB."""
    return int(
        re.search(field + r':\s+(\d+)', open_bytes('/proc/%d/status' % pid).decode()).group(1)
    )


def descriptors():
    return len(os.listdir('/proc/self/fd'))


def open_files():
    """What our descriptors are, to be shown when there are too many."""
    found = {}
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            found[name] = os.readlink('/proc/self/fd/' + name)
    return found


@pytest.fixture(autouse=True)
def leaves_nothing_behind(shared_agent):
    """No thread, descriptor or child outlives a test, but those of the shared agent."""
    threads, fds = set(threading.enumerate()), descriptors()
    processes = children() | children()  # one may be missed while the thread that made it ends
    yield
    if os.path.isdir('/proc/self/fd'):
        eventually(lambda: set(threading.enumerate()) <= threads)
        with contextlib.suppress(AssertionError):
            eventually(lambda: descriptors() <= fds and children() <= processes)
        assert children() <= processes
        assert descriptors() <= fds, open_files()


class Keys:
    """Identities for the tests, each made once."""

    def __init__(self, folder):
        self._folder = folder

    def __getitem__(self, name):
        path = os.path.join(self._folder, name + '.pem')
        if not os.path.exists(path):
            return tentacle.create_identity(path)
        return tentacle.load_identity(path)

    def special(self, name, *request):
        """An identity by `openssl req` with these arguments."""
        path = os.path.join(self._folder, name + '.pem')
        key = ['-newkey', 'rsa:2048'] if '-newkey' not in request else []
        command = [
            'openssl',
            'req',
            '-x509',
            '-nodes',
            '-keyout',
            path + '.key',
            '-out',
            path + '.crt',
        ]
        subprocess.run(
            command + key + list(request),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        tentacle.write_private(path, open_bytes(path + '.key') + open_bytes(path + '.crt'))
        return tentacle.load_identity(path)

    def dated(self, name, moment, monkeypatch):
        """An identity that was made at a moment, valid for a year."""
        with monkeypatch.context() as patch:
            patch.setattr(tentacle, 'CERTIFICATE_YEARS', 1)
            patch.setattr(tentacle.time, 'time', lambda: moment)
            return tentacle.create_identity(os.path.join(self._folder, name + '.pem'))


def keys_of(keys):
    """Some of the keys as a dictionary."""
    return {name: keys[name] for name in ('agent', 'server')}


def open_bytes(path):
    with open(path, 'rb') as file:
        return file.read()


@pytest.fixture(scope='session')
def keys(tmp_path_factory):
    return Keys(str(tmp_path_factory.mktemp('keys')))


class Agent:
    """`python3 tentacle.py listen` as a process. `port`, `log()`, `stop()`."""

    def __init__(self, home, *arguments, program=PROGRAM, port=0, prefix=(), bare=False):
        self.home = str(home)
        self._log_path = self.home + '.log'
        command = [sys.executable, program, 'listen', '--home', self.home, '--port', str(port)]
        with open(self._log_path, 'ab') as log:
            self.process = subprocess.Popen(
                list(prefix) + command + list(arguments),
                stdout=subprocess.PIPE,
                stderr=log,
                env={} if bare else None,
            )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.decode().rstrip('\n'))
            if line.startswith(b'Agent listening on: '):
                break
        else:
            self.process.wait()
            self.process.stdout.close()
            raise AssertionError(self.log())
        self.port = int(self.lines[-1].rpartition(':')[2])
        self.identity = tentacle.load_identity(os.path.join(self.home, 'tentacle.pem'))
        self.endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % self.port, self.identity.thumbprint
        )

    def log(self):
        with open(self._log_path, encoding='utf-8') as file:
            return file.read()

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        exit_code = self.process.wait(20)
        self.process.stdout.close()
        return exit_code


@pytest.fixture(scope='session')
def shared_agent(tmp_path_factory, keys):
    """One agent for all tests that need nothing special; it trusts `keys['server']`."""
    agent = Agent(tmp_path_factory.mktemp('shared') / 'agent', '--trust', keys['server'].thumbprint)
    yield agent
    assert agent.stop() == 0
    assert 'a bug' not in agent.log()


@pytest.fixture
def client(shared_agent, keys):
    with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
        yield client


@contextlib.contextmanager
def listening(home, identity, trusted=(), files_root=None, **limits):
    """A listening tentacle in this process, with limits of its own."""
    limits = LIMITS._replace(**limits)
    services = tentacle.AgentServices(str(home), files_root=files_root, limits=limits)
    agent = tentacle.ListeningTentacle(
        services, identity, lambda: frozenset(trusted), port=0, limits=limits
    )
    services.start()
    agent.start()
    try:
        yield agent
    finally:
        agent.stop()
        services.stop()


def dial(port, identity=None, version=None, host='127.0.0.1'):
    """A bare TLS connection, with a client certificate or without; no Halibut yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers(tentacle.CIPHERS)
    if identity:
        context.load_cert_chain(identity.path)
    if version:
        context.minimum_version = context.maximum_version = version
    sock = socket.create_connection((host, port), 20)
    try:
        return context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise


def received(sock):
    """All that comes until the connection ends, however it ends."""
    parts = []
    with contextlib.suppress(OSError):
        while True:
            part = sock.recv(65536)
            if not part:
                break
            parts.append(part)
    return b''.join(parts)


class Peer:
    """A trusted client that sends what bytes it likes."""

    def __init__(self, port, identity, version=None):
        self.sock = dial(port, identity, version)
        self.sock.sendall(b'MX\n\nMX-CLIENT 1.0\r\n\r\n')
        self._buffer = b''
        assert self.take_line() == b'MX-SERVER 1.0\r\n'
        assert self.take_line() == b'\r\n'

    def _fill(self):
        part = self.sock.recv(65536)
        if not part:
            raise EOFError
        self._buffer += part

    def take(self, count):
        while len(self._buffer) < count:
            self._fill()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def take_line(self):
        while b'\n' not in self._buffer:
            self._fill()
        return self.take(self._buffer.index(b'\n') + 1)

    def take_message(self):
        inflate, raw = zlib.decompressobj(-15), b''
        while not inflate.eof:
            if not self._buffer:
                self._fill()
            raw += inflate.decompress(self._buffer)
            self._buffer = inflate.unused_data
        return tentacle.decode_bson(raw)['Message']

    def call(self, message):
        """Send the bytes of a request; the decoded answer."""
        self.sock.sendall(message)
        return self.take_message()

    def go_on(self):
        self.sock.sendall(b'NEXT\r\n')
        assert self.take_line() == b'PROCEED\r\n'

    def is_hung_up_on(self):
        """Whether the other side closes without another byte."""
        return self._buffer + received(self.sock) == b''

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.sock.close()


class Subscriber(Peer):
    """A trusted tentacle that polls for poll://one/, and sends what bytes it likes."""

    def __init__(self, port, identity):
        self.sock = dial(port, identity)
        self.sock.sendall(b'MX\n\nMX-SUBSCRIBER 1.0 poll://one/\r\n\r\n')
        self._buffer = b''
        assert self.take(len(IDENTIFIED)) == IDENTIFIED

    def answer(self, request, control=b'NEXT\r\n', **members):
        self.sock.sendall(response_bytes(request_id=request['id'], **members) + control)

    def answers(self):
        """Answer all that comes, in a thread, until the end."""

        def answer_all():
            with contextlib.suppress(OSError, EOFError):
                while True:
                    request = self.take_message()
                    if request is None:
                        self.sock.sendall(b'NEXT\r\n')
                    else:
                        self.answer(request)
                    self.take_line()

        threading.Thread(target=answer_all).start()


class Forwarder:
    """Stands between a dialler and a port, and does harm: `plan(number)` gives what happens to each
    connection, faults as (kind, to the server?, after how many bytes). `port`, `connections`.
    """

    def __init__(self, port, plan=lambda number: []):
        self._server = socket.create_server(('127.0.0.1', 0))
        self._to = port
        self._plan = plan
        self._ended = threading.Event()
        self._socks = []
        self._threads = []
        self.port = self._server.getsockname()[1]
        self.connections = 0
        self._start(self._accept)

    def _start(self, function, *arguments):
        thread = threading.Thread(target=function, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(('127.0.0.1', self._to))
            except OSError:
                return
            self._socks += [near, far]
            self.connections += 1
            faults = self._plan(self.connections)
            self._start(self._pass_on, near, far, [fault for fault in faults if fault[1]])
            self._start(self._pass_on, far, near, [fault for fault in faults if not fault[1]])

    def _pass_on(self, source, target, faults):
        with contextlib.suppress(OSError):
            for kind, _, left in faults:
                while left > 0:
                    data = source.recv(min(65536, left))
                    if not data:
                        break
                    target.sendall(data)
                    left -= len(data)
                getattr(self, kind)(source, target)
            while True:
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self, source, target):
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                sock.shutdown(socket.SHUT_RDWR)  # wakes the other thread
            sock.close()
        raise OSError

    def half_close(self, source, target):
        target.shutdown(socket.SHUT_WR)
        raise OSError

    def swallow(self, source, target):
        while source.recv(65536):
            pass
        raise OSError

    def delay(self, source, target):
        self._ended.wait(0.5)

    def trickle(self, source, target):
        for _ in range(300):
            target.sendall(source.recv(1))
            self._ended.wait(0.001)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._ended.set()
        for sock in [self._server] + self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        while self._threads:
            self._threads.pop().join()


def deflated(raw, level=6):
    deflate = zlib.compressobj(level, wbits=-15)
    return deflate.compress(raw) + deflate.flush()


def inflated(message):
    return zlib.decompress(message, -15)


def request_bytes(service, method, *params, **changes):
    """The bytes of a request as our dispatcher writes it, with members changed."""
    request = tentacle.Request(
        '%s::%s[1] / x' % (service, method), service, method, list(params), uuid.uuid4()
    )
    message, streams = tentacle.request_to_message(request)
    message.update(changes)
    return deflated(tentacle.encode_bson({'Message': message}))


def start_command(body, ticket, **members):
    members.setdefault('duration_to_wait', 20.0)
    members.setdefault('task_id', 'ServerTasks-1')
    return tentacle.StartScriptCommandV2(
        ticket=tentacle.ScriptTicket(task_id=ticket),
        script_body=body,
        **members,
    )


def about(cls, ticket, after=0):
    members = {'ticket': tentacle.ScriptTicket(task_id=ticket)}
    if 'last_log_sequence' in cls.members:
        members['last_log_sequence'] = after
    return cls(**members)


def v2(client, method, command, service='IScriptServiceV2'):
    """Call a script service; the lines of a status as a list."""
    status = client.call(service, method, command)
    if hasattr(status, 'logs'):
        status.logs = list(status.logs)
    return status


def texts(status, source=None):
    """A script's own lines in a status answer."""
    remarks = tentacle.RemarkFilter()
    lines = [remarks.line(entry) for entry in status.logs]
    return [line.text for line in lines if not line.remark and source in (None, line.source)]


def finished(client, ticket):
    """The status of a script when it is complete."""

    def ask():
        status = v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket))
        return status if status.state == tentacle.COMPLETE else None

    return eventually(ask, 20)


@functools.lru_cache(None)
def bytecode():
    """What lets `python3 -m tentacle` start without being compiled, as on a host after the first
    time: half a second each, in a suite that starts it some hundred times.
    """
    folder = tempfile.mkdtemp(prefix='tentacle-bytecode-')
    atexit.register(shutil.rmtree, folder)
    before, sys.pycache_prefix = sys.pycache_prefix, folder
    py_compile.compile(PROGRAM)
    sys.pycache_prefix = before
    return {'PYTHONPATH': HERE, 'PYTHONPYCACHEPREFIX': folder}


def cli(*arguments, home=None, stdin=b'', **environment):
    """(exit code, stdout, stderr) of `python3 -m tentacle ...`; the processes that stay are started
    as `python3 tentacle.py`.
    """
    command = [sys.executable, '-m', 'tentacle'] + list(arguments)
    if home is not None:
        command[4:4] = ['--home', str(home)]
    done = subprocess.run(
        command,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        env=dict(os.environ, **bytecode(), **environment),
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def installed(folder):
    """(path, environment) of the program as a user has it: Python keeps its bytecode."""
    environment = dict(os.environ)
    environment.pop('PYTHONDONTWRITEBYTECODE', None)
    program = shutil.copy(PROGRAM, os.path.join(folder, 'tentacle.py'))
    py_compile.compile(program)
    return program, environment


class ScriptedStream:
    """Stands in for a SecureStream: gives these bytes in pieces, keeps what is written."""

    peer = 'scripted'

    def __init__(self, data, piece=1 << 20):
        self._data = data
        self._piece = piece
        self.written = []

    def read_some(self, most=1 << 16):
        count = min(most, self._piece)
        some, self._data = self._data[:count], self._data[count:]
        return some

    def unread(self, data):
        self._data = data + self._data

    def read_into(self, view):
        view[:] = self.read_exactly(len(view))

    read_exactly = tentacle.SecureStream.read_exactly
    read_until = tentacle.SecureStream.read_until
    read_line = tentacle.SecureStream.read_line

    def write(self, data):
        self.written.append(bytes(data))  # the original may be a buffer that is used again

    def set_timeout(self, seconds):
        pass

    def close(self):
        pass


# ---- 0. Imports and names ------------------------------------------------------------------------


def source_tree():
    with open(PROGRAM, encoding='utf-8') as file:
        return ast.parse(file.read())


def defined_names(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [
            n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
        ]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split('.')[0] for alias in node.names]
    return []


def test_a_definition_uses_only_what_stands_above_it():
    lines = {}
    for node in source_tree().body:
        for name in defined_names(node):
            lines.setdefault(name, node.lineno)
    late = [
        '%s in line %d, defined in line %d' % (n.id, n.lineno, lines[n.id])
        for n in ast.walk(source_tree())
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and lines.get(n.id, 0) > n.lineno
    ]
    assert late == []


def test_it_imports_the_standard_library_alone():
    names = set()
    for node in ast.walk(source_tree()):
        if isinstance(node, ast.Import):
            names.update(alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split('.')[0])
    if sys.version_info >= (3, 10):
        assert names - {'tentacle'} <= set(sys.stdlib_module_names)
    assert 'ssl' in names


def test_the_table_of_contents_is_true():
    with open(PROGRAM, encoding='utf-8') as file:
        dividers = re.findall(r'^# ---- (\d+)\. (.+?) -+$', file.read(), re.M)
    listed = re.findall(r'(\d+)  ([A-Z][\w ]+?)(?=  +|$)', tentacle.__doc__, re.M)
    assert dividers == sorted(listed, key=lambda entry: int(entry[0]))


def test_public_names_are_there_and_documented():
    for name in tentacle.__all__:
        assert getattr(tentacle, name).__doc__


# ---- 3. Logging and threads ----------------------------------------------------------------------


@pytest.mark.parametrize(
    'text, shown',
    [
        ('plain', 'plain'),
        ('two\nlines\r', 'two\\nlines\\r'),
        ('\x1b[31mred', '\\x1b[31mred'),
        ('ünïcode ✓', 'ünïcode ✓'),
        ('\u202eevil', '\\u202eevil'),
        ('x' * 400, 'x' * 300 + '...'),
    ],
)
def test_peer_text_is_one_harmless_line(text, shown):
    assert tentacle.printable(text) == shown


# ---- 4. Certificates and thumbprints -------------------------------------------------------------

SHA1_TEXT = '6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3'


@pytest.mark.parametrize(
    'text',
    [
        SHA1_TEXT,
        SHA1_TEXT.lower(),
        ':'.join(SHA1_TEXT[i : i + 2] for i in range(0, 40, 2)),
        ' '.join(SHA1_TEXT[i : i + 4] for i in range(0, 40, 4)) + '\n',
        '\u200e' + SHA1_TEXT,
    ],
)
def test_thumbprints_are_taken_as_people_write_them(text):
    assert tentacle.parse_thumbprint(text) == SHA1_TEXT


@pytest.mark.parametrize(
    'text', ['', 'x', SHA1_TEXT[:-1], SHA1_TEXT + '0', 'g' * 40, SHA1_TEXT[:-1] + 'ß']
)
def test_malformed_thumbprints_are_refused(text):
    with pytest.raises(tentacle.UsageError, match='40 hex digits'):
        tentacle.parse_thumbprint(text)


def test_a_certificate_is_pinned_by_either_hash():
    certificate = b'some DER'
    assert tentacle.is_pinned(certificate, [hashlib.sha1(certificate).hexdigest().upper()])
    assert tentacle.is_pinned(certificate, [hashlib.sha256(certificate).hexdigest().upper()])
    assert not tentacle.is_pinned(certificate, [SHA1_TEXT])
    assert not tentacle.is_pinned(None, [SHA1_TEXT])
    assert not tentacle.is_pinned(b'', [hashlib.sha1(b'').hexdigest().upper()])


@pytest.mark.parametrize('with_openssl', [True, False])
def test_a_new_identity(tmp_path, monkeypatch, with_openssl):
    if with_openssl and not OPENSSL:
        pytest.skip('there is no openssl program here')
    if not with_openssl:
        monkeypatch.setenv('PATH', str(tmp_path))
    path = str(tmp_path / 'home' / 'tentacle.pem')
    identity = tentacle.create_identity(path)
    monkeypatch.undo()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert os.listdir(os.path.dirname(path)) == ['tentacle.pem']
    assert tentacle.load_identity(path).content == identity.content
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
    if OPENSSL:
        text = subprocess.check_output(['openssl', 'x509', '-text', '-in', path]).decode()
        yesterday = time.strftime('%b %e', time.gmtime(time.time() - 86400))
        for expected in (
            'Version: 3 ',
            'Signature Algorithm: sha256WithRSAEncryption',
            'Issuer: CN = Octopus Tentacle' if 'CN = ' in text else 'Issuer: CN=Octopus Tentacle',
            'Public-Key: (2048 bit)',
            'Not Before: ' + yesterday,
            'Exponent: 65537',
        ):
            assert expected in text
        years = re.findall(r'Not (?:Before|After) ?: .* (\d{4}) GMT', text)
        assert int(years[1]) - int(years[0]) == 100
        verified = ['openssl', 'verify', '-CAfile', path, path]
        assert b'OK' in subprocess.check_output(verified)
        assert b'RSA key ok' in subprocess.check_output(
            ['openssl', 'rsa', '-check', '-noout', '-in', path]
        )


def test_small_primes_and_composites():
    primes = [n for n in range(2001, 3000) if tentacle._is_probable_prime(n)]
    assert primes == [n for n in range(2001, 3000) if all(n % d for d in range(2, 60))]
    carmichael = 2465 * 2821 * 6601
    assert not tentacle._is_probable_prime(carmichael)


@pytest.mark.skipif(not OPENSSL, reason='there is no openssl program here')
@pytest.mark.parametrize('form', ['pem', 'pfx', 'legacy pfx', 'pfx without password'])
def test_import_certificate(tmp_path, keys, form):
    other, source = keys['other'], str(tmp_path / 'source')
    password = '' if form == 'pfx without password' else 'pa ss"wörd'
    if form == 'pem':
        shutil.copy(other.path, source)
    else:
        export = [
            'openssl',
            'pkcs12',
            '-export',
            '-in',
            other.path,
            '-out',
            source,
            '-passout',
            'stdin',
        ]
        legacy = ['-keypbe', 'PBE-SHA1-3DES', '-certpbe', 'PBE-SHA1-RC2-40', '-macalg', 'SHA1']
        if (
            form == 'legacy pfx'
            and b'-legacy'
            in subprocess.run(
                ['openssl', 'pkcs12', '-help'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ).stdout
        ):
            legacy.append('-legacy')
        subprocess.run(
            export + (legacy if form == 'legacy pfx' else []),
            input=password.encode() + b'\n',
            check=True,
        )
    home = tmp_path / 'home'
    command = ['import-certificate', '--from-file', source]
    code, out, err = cli(
        *command, *(['--pfx-password', password] if form != 'pem' else []), home=home
    )
    assert code == 0, err
    assert 'The certificate was imported, its thumbprint is %s\n' % other.thumbprint in out
    assert cli('show-thumbprint', home=home)[1] == other.thumbprint
    assert stat.S_IMODE(os.stat(str(home / 'tentacle.pem')).st_mode) == 0o600


def test_a_bad_import_leaves_the_identity_as_it_was(tmp_path, keys):
    home = tmp_path / 'home'
    before = cli('show-thumbprint', home=home)[1]
    mixed = tmp_path / 'mixed.pem'  # a key, and the certificate of another
    key = open_bytes(keys['other'].path).split(b'-----BEGIN CERTIFICATE')[0]
    certificate = open_bytes(keys['server'].path)
    mixed.write_bytes(key + certificate[certificate.index(b'-----BEGIN CERTIFICATE') :])
    (tmp_path / 'only.pem').write_bytes(certificate[certificate.index(b'-----BEGIN CERTIFICATE') :])
    (tmp_path / 'noise').write_bytes(b'no certificate at all')
    for name in ('mixed.pem', 'only.pem', 'noise', 'missing'):
        code, out, err = cli('import-certificate', '--from-file', str(tmp_path / name), home=home)
        assert (code, out, err.count('\n')) == (1, '', 1), err
        assert name in err
    assert cli('show-thumbprint', home=home)[1] == before
    assert sorted(os.listdir(str(home))) == ['Logs', 'tentacle-default.config', 'tentacle.pem']


@pytest.mark.parametrize(
    'key, encrypted',
    [
        (bytes(range(16)), '69c4e0d86a7b0430d8cdb78070b4c55a'),  # FIPS 197, C.1
        (bytes(range(32)), '8ea2b7ca516745bfeafc49904b496089'),  # FIPS 197, C.3
    ],
)
def test_aes_of_the_standard(key, encrypted):
    block = bytes.fromhex('00112233445566778899aabbccddeeff')
    aes = tentacle.Aes(key)
    assert aes.encrypt_block(block).hex() == encrypted
    assert aes.decrypt_block(bytes.fromhex(encrypted)) == block


# Files as the original keeps them: AesEncryption of Octopus.Tentacle.Core, with this password.
ENCRYPTION_PASSWORD = 'purple-monkey-dishwasher'
ENCRYPTED_FILES = [
    ('', 'SVZfX3UtEuE7wi4icE7AyZZiYMfJ7HAKseMx/ApLmQjfKTJa'),
    ('FooBar', 'SVZfX+i2PFiw/52SWNiUJxbpGNlHwEZ4+M0OZMJOea+AeoIN'),
    (
        'exactly 16 bytes',
        'SVZfX9gBpnh5Z584wDMS8Mp8dGxnLSjcZT3NhfxZz6A1DXPUE446b+ftgSAP7pPwzejnSQ==',
    ),
    (
        'ünïcode ✓ over two blocks of sixteen bytes',
        'SVZfX1vhApWdJQzMpieubLRJTcOQXXe7/1+6RSMvrIOS5a3X/PgvR8tJ6ky8S+Ty4AlFJXoKuV9MIgLddeRB0lKM'
        'HeE=',
    ),
]


@pytest.mark.parametrize('text, encrypted', ENCRYPTED_FILES)
def test_files_are_encrypted_as_by_the_original(monkeypatch, text, encrypted):
    """With its IV, the same bytes."""
    expected = base64.b64decode(encrypted)
    monkeypatch.setattr(tentacle.secrets, 'token_bytes', lambda size: expected[4 : 4 + size])
    target = io.BytesIO()
    tentacle.encrypt_script_file(io.BytesIO(text.encode()), target, ENCRYPTION_PASSWORD)
    assert target.getvalue() == expected


# ---- 5. Secure streams ---------------------------------------------------------------------------


def peer_outcome(port, identity, version):
    """What a client gets that says MX: 'served', or 'nothing'."""
    try:
        with dial(port, identity, version) as sock:
            sock.sendall(b'MX\n\nMX-CLIENT 1.0\r\n\r\n')
            answer = sock.recv(100)
            return (
                'served'
                if answer == b'MX-SERVER 1.0\r\n\r\n'
                else 'nothing'
                if not answer
                else answer
            )
    except OSError:
        return 'nothing'


@pytest.mark.parametrize('version', [TLS_1_2, TLS_1_3])
def test_a_trusted_client_is_served(shared_agent, keys, version):
    assert peer_outcome(shared_agent.port, keys['server'], version) == 'served'


@pytest.mark.parametrize('version', [TLS_1_2, TLS_1_3])
def test_an_untrusted_client_gets_nothing_and_one_line_in_the_log(shared_agent, keys, version):
    before = shared_agent.log()
    assert peer_outcome(shared_agent.port, keys['stranger'], version) == 'nothing'
    line = eventually(lambda: shared_agent.log()[len(before) :])
    assert line.count('\n') == 1
    assert re.search(
        r'WARNING 127\.0\.0\.1:\d+: refused, the thumbprint %s is not trusted\. To trust it: '
        r'python3 \S+tentacle\.py configure --config \S+ --trust %s\n'
        % ((keys['stranger'].thumbprint,) * 2),
        line,
    ), line


@pytest.mark.parametrize('version', [TLS_1_2, TLS_1_3])
def test_a_client_without_a_certificate_gets_nothing(shared_agent, version):
    before = shared_agent.log()
    assert peer_outcome(shared_agent.port, None, version) == 'nothing'
    line = eventually(lambda: shared_agent.log()[len(before) :])
    assert 'shows no certificate' in line and line.count('\n') == 1


@pytest.mark.skipif(not OPENSSL, reason='there is no openssl program here')
@pytest.mark.parametrize('version', [TLS_1_2, TLS_1_3])
def test_odd_certificates_are_fine_when_pinned(tmp_path, keys, version, monkeypatch):
    config = tmp_path / 'openssl.cnf'
    config.write_text(
        '[req]\ndistinguished_name=dn\n[dn]\n'
        '[server]\nextendedKeyUsage=serverAuth\n'
        '[sign]\nkeyUsage=critical,keyCertSign\nbasicConstraints=critical,CA:true\n'
        '[unknown]\n1.2.3.4.5=critical,DER:0500\n'
    )
    with_config = ['-config', str(config), '-subj', '/CN=odd', '-extensions']
    odd = [
        keys.dated('expired', 0, monkeypatch),
        keys.dated('not yet valid', time.time() + 30 * 86400, monkeypatch),
        keys.special('sha1', '-subj', '/CN=old', '-sha1'),
        keys.special('short', '-subj', '/CN=old', '-newkey', 'rsa:1024'),
        keys.special(
            'curve', '-subj', '/CN=ec', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256'
        ),
        keys.special('nameless', '-subj', '/'),
        keys.special('named', '-subj', '/C=CN/O=\u00fc\u2713/CN=*'),
        keys.special('server-only', *(with_config + ['server'])),
        keys.special('signing-only', *(with_config + ['sign'])),
        keys.special('unknown-extension', *(with_config + ['unknown'])),
    ]
    with listening(tmp_path, keys['agent'], [identity.thumbprint for identity in odd]) as agent:
        outcomes = [peer_outcome(agent.port, identity, version) for identity in odd]
        assert outcomes == ['served'] * len(odd)
        assert peer_outcome(agent.port, keys['stranger'], version) == 'nothing'
    with listening(tmp_path, keys['agent'], []) as agent:
        assert {peer_outcome(agent.port, identity, version) for identity in odd} == {'nothing'}


def test_a_certificate_pinned_by_sha256_and_trust_taken_away(tmp_path, keys):
    trusted = {keys['server'].sha256_thumbprint}
    with listening(tmp_path, keys['agent']) as agent:
        agent._listener._acceptor._trusted = lambda: frozenset(trusted)
        assert peer_outcome(agent.port, keys['server'], TLS_1_3) == 'served'
        trusted.clear()
        assert peer_outcome(agent.port, keys['server'], TLS_1_3) == 'nothing'


def test_a_certificate_that_a_pinned_one_issued_is_not_trusted(tmp_path, keys):
    """Pinning a certificate authority trusts that certificate, not what it signs."""
    issuer, holder = tentacle.generate_rsa_key(), tentacle.generate_rsa_key()
    issued = tentacle.self_signed_certificate(holder)
    body = list(tentacle._der_items(issued))[0][1]
    parts = list(tentacle._der_items(body))
    to_be_signed = tentacle._der(*parts[0])
    signed = tentacle._der(
        0x30,
        to_be_signed,
        tentacle._der(*parts[1]),
        tentacle._der(3, b'\0', issuer.sign(to_be_signed)),
    )
    path = str(tmp_path / 'issued.pem')
    pem = tentacle.pem('RSA PRIVATE KEY', holder.to_der()) + tentacle.pem('CERTIFICATE', signed)
    tentacle.write_private(path, pem.encode())
    authority = tentacle.self_signed_certificate(issuer)
    with listening(tmp_path, keys['agent'], [tentacle.thumbprint_of(authority)]) as agent:
        for version in (TLS_1_2, TLS_1_3):
            assert peer_outcome(agent.port, tentacle.load_identity(path), version) == 'nothing'


def test_a_dialler_knows_the_peer_before_it_sends_a_byte(keys):
    """Against a server with another certificate nothing but a handshake arrives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys['other'].path)
    got = []
    with socket.create_server(('127.0.0.1', 0)) as server:

        def serve():
            sock, _ = server.accept()
            with context.wrap_socket(sock, server_side=True) as secure:
                got.append(received(secure))

        thread = threading.Thread(target=serve)
        thread.start()
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % server.getsockname()[1], SHA1_TEXT
        )
        with pytest.raises(tentacle.UntrustedThumbprint, match='NOT THE PINNED ONE') as caught:
            tentacle.connect(endpoint, keys['server'])
        thread.join()
    assert got == [b'']
    assert SHA1_TEXT in str(caught.value) and keys['other'].thumbprint in str(caught.value)


@pytest.mark.parametrize('piece', [1, 2, 100])
@pytest.mark.parametrize(
    'data, line, left',
    [
        (b'NEXT\r\nrest', 'NEXT', b'rest'),
        (b'\r\nNEXT\r\n', '', b'NEXT\r\n'),
        (b'a\nb\r\n', 'a\nb', b''),
        (b'', None, b''),
    ],
)
def test_lines_end_with_cr_lf(data, line, left, piece):
    stream = ScriptedStream(data, piece)
    assert stream.read_line(100) == line
    assert b''.join(iter(stream.read_some, b'')) == left


def test_a_line_that_does_not_end():
    with pytest.raises(tentacle.ConnectionLost, match='middle of a line'):
        ScriptedStream(b'no end').read_line(100)


@pytest.mark.parametrize('data', [b'a\rb\r\n', b'x' * 101, b'\r\r\n'])
def test_bad_lines_are_refused(data):
    with pytest.raises(tentacle.ProtocolError):
        ScriptedStream(data).read_line(100)


# ---- 6. Proxies and dialling ---------------------------------------------------------------------


@pytest.mark.parametrize(
    'text, uri',
    [
        ('host', 'https://host:10933/'),
        ('Host:1', 'https://host:1/'),
        ('https://host', 'https://host:10933/'),
        ('https://host:65535/', 'https://host:65535/'),
        ('[::1]:99', 'https://[::1]:99/'),
        ('::1', 'https://[::1]:10933/'),
        ('[fe80::1%eth0]', 'https://[fe80::1%eth0]:10933/'),
        ('10.0.0.1', 'https://10.0.0.1:10933/'),
    ],
)
def test_targets_as_people_write_them(text, uri):
    assert tentacle.parse_target_uri(text) == uri


@pytest.mark.parametrize(
    'text', ['', 'host:', 'host:0', 'host:65536', 'http://host/', 'a b', 'https://u:p@host/', 'h/p']
)
def test_what_is_no_target(text):
    with pytest.raises(tentacle.UsageError):
        tentacle.parse_target_uri(text)


PROXY = tentacle.Proxy('px', 3128, 'us er', tentacle.Secret('geheim'))


@pytest.mark.parametrize(
    'text, proxy',
    [
        ('http://px:3128', ('px', 3128, '', '')),
        ('px:3128', ('px', 3128, '', '')),
        ('http://px/', ('px', 80, '', '')),
        ('http://us%20er:p%40ss:w@px:1', ('px', 1, 'us er', 'p@ss:w')),
        ('http://[::1]:8080', ('::1', 8080, '', '')),
    ],
)
def test_proxies_as_people_write_them(text, proxy):
    assert tuple(tentacle.parse_proxy(text))[:3] == proxy[:3]
    assert tentacle.parse_proxy(text).password.encode().decode() == proxy[3]
    assert tentacle.parse_proxy(text, 'apart').password.encode() == b'apart'


@pytest.mark.parametrize('text', ['', 'https://u:geheim@px:1', 'http://u:geheim@px:x', 'ftp://px'])
def test_what_is_no_proxy(text):
    with pytest.raises(tentacle.UsageError) as caught:
        tentacle.parse_proxy(text)
    assert 'geheim' not in str(caught.value)


@pytest.mark.parametrize(
    'host, no_proxy, exempt',
    [
        ('a.b.c', 'x, b.c', True),
        ('a.b.c', '.b.c', True),
        ('b.c', '.b.c', True),
        ('A.B.c', '*.b.C', True),
        ('ab.c', 'b.c', False),
        ('any', '*', True),
        ('10.1.2.3', '10.0.0.0/8', True),
        ('10.1.2.3', '11.0.0.0/8 10.1.2.3', True),
        ('10.1.2.3', '3,1.2.3', False),
        ('::1', '::1', True),
        ('fe80::1', 'fe80::/10', True),
        ('h', 'h:443', True),
        ('h', 'h:80', False),
        ('h', '', False),
    ],
)
def test_no_proxy(host, no_proxy, exempt):
    uri = 'https://%s:443/' % ('[%s]' % host if ':' in host else host)
    environment = {'HTTPS_PROXY': 'http://px:3128', 'no_proxy': no_proxy}
    assert (tentacle.proxy_of_environment(uri, environment) is None) == exempt


def test_the_environments_proxy():
    environment = {'https_proxy': 'http://a:1', 'HTTPS_PROXY': 'http://b:1', 'ALL_PROXY': 'c:1'}
    for name in ('a', 'b', 'c'):
        assert tentacle.proxy_of_environment('https://h:1/', environment).host == name
        environment.pop(next(iter(environment)))
    assert tentacle.proxy_of_environment('https://h:1/', environment) is None


def test_the_originals_connect_request():
    bare = PROXY._replace(user='', password=tentacle.Secret())
    assert tentacle._connect_request(bare, 'h:1') == b'CONNECT h:1 HTTP/1.0\r\nHost: h:1\r\n\r\n'
    credentials = base64.b64encode(b'us er:geheim')
    assert (
        tentacle._connect_request(PROXY, 'h:1')
        == b'CONNECT h:1 HTTP/1.0\r\nHost: h:1\r\nProxy-Authorization: Basic %s\r\n\r\n'
        % credentials
    )


@pytest.mark.parametrize(
    'answer, words',
    [
        (b'HTTP/1.0 407 Auth\r\n\r\n', 'refuses user us er'),
        (b'HTTP/1.1 403 No\r\nX: y\r\n\r\n', 'does not allow CONNECT to h:1'),
        (b'HTTP/1.1 502 Bad\r\n\r\n', 'can not reach h:1'),
        (b'HTTP/1.1 500 Oh\r\n\r\n', 'can not reach h:1'),
        (b'HTTP/1.1 501 Oh\r\n\r\n', 'status 501'),
        (b'<html>welcome</html>', 'no HTTP proxy'),
        (b'HTTP/9 nonsense\r\n\r\n', 'HTTP/9 nonsense'),
        (b'HTTP/1.0 200 OK\r\n' + b'X: y\r\n' * 9999, 'no HTTP proxy'),
        (b'', 'closes the connection without an answer'),
        (None, 'does not answer CONNECT'),
    ],
)
def test_proxies_that_refuse(answer, words):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if answer is not None:
            theirs.sendall(answer)
            theirs.shutdown(socket.SHUT_WR)
        limits = LIMITS._replace(connect=0.2)
        with pytest.raises(tentacle.NotDelivered, match=words) as caught:
            tentacle._open_tunnel(ours, PROXY, 'h:1', limits)
    assert 'px:3128' in str(caught.value) and 'geheim' not in str(caught.value)


@pytest.mark.parametrize('head', [b'HTTP/1.0 200 OK\r\n\r\n', b'HTTP/1.1 200 x\r\nA: b\r\n\r\n'])
def test_a_tunnel_begins_right_behind_the_blank_line(head):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(head + b'\r\nfirst')
        tentacle._open_tunnel(ours, PROXY, 'h:1', LIMITS)
        assert ours.recv(100) == b'\r\nfirst'


# ---- 7. BSON -------------------------------------------------------------------------------------


def bson(*elements):
    body = b''.join(elements)
    return struct.pack('<i', len(body) + 5) + body + b'\0'


GUID = uuid.UUID('00112233-4455-6677-8899-aabbccddeeff')
GUID_BYTES = bytes.fromhex('33221100554477668899aabbccddeeff')

BSON_TABLE = [
    ({}, bson()),
    ({'a': None}, bson(b'\x0aa\0')),
    ({'a': True, 'b': False}, bson(b'\x08a\0\1', b'\x08b\0\0')),
    ({'a': 1}, bson(b'\x10a\0\1\0\0\0')),
    ({'a': -1}, bson(b'\x10a\0\xff\xff\xff\xff')),
    ({'a': Int64(1)}, bson(b'\x12a\0\1\0\0\0\0\0\0\0')),
    ({'a': UtcDate(-1)}, bson(b'\x09a\0' + b'\xff' * 8)),
    ({'a': 1.5}, bson(b'\x01a\0' + struct.pack('<d', 1.5))),
    ({'a': ''}, bson(b'\x02a\0\1\0\0\0\0')),
    ({'a': 'x\0ü✓'}, bson(b'\x02a\0\x08\0\0\0x\0\xc3\xbc\xe2\x9c\x93\0')),
    ({'a': {'b': 1}}, bson(b'\x03a\0' + bson(b'\x10b\0\1\0\0\0'))),
    ({'a': [1, 'x']}, bson(b'\x04a\0' + bson(b'\x100\0\1\0\0\0', b'\x021\0\2\0\0\0x\0'))),
    ({'a': GUID}, bson(b'\x05a\0\x10\0\0\0\x04' + GUID_BYTES)),
    ({'a': b'xy'}, bson(b'\x05a\0\2\0\0\0\0xy')),
]


@pytest.mark.parametrize('value, data', BSON_TABLE)
def test_bson_both_ways(value, data):
    assert tentacle.encode_bson(value) == data
    decoded = tentacle.decode_bson(data)
    assert decoded == value
    assert list(decoded) == list(value)


def test_an_old_uuid_subtype_is_read():
    assert tentacle.decode_bson(bson(b'\x05a\0\x10\0\0\0\x03' + GUID_BYTES)) == {'a': GUID}


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\5\0\0\0',
        b'\5\0\0\0\1',
        b'\4\0\0\0\0',
        b'\xff\xff\xff\xff\0',
        bson() + b'x',
        bson(b'\x10a\0\1\0\0'),
        bson(b'\x10a'),
        bson(b'\x02a\0\0\0\0\0'),
        bson(b'\x02a\0\2\0\0\0xy'),
        bson(b'\x02a\0\xff\xff\xff\x7fx\0'),
        bson(b'\x02a\0\xff\xff\xff\xffx\0'),
        bson(b'\x02a\0\2\0\0\0\xff\0'),
        bson(b'\x02\xff\0\1\0\0\0\0'),
        bson(b'\x03a\0\xff\0\0\0\0'),
        bson(b'\x03a\0\4\0\0\0\0'),
        bson(b'\x05a\0\xff\0\0\0\0x'),
        bson(b'\x05a\0\xff\xff\xff\xff\0x'),
        bson(b'\x06a\0'),
        bson(b'\x13a\0' + b'\0' * 16),
        bson(b'\x7fa\0'),
        bson(b'\x01a\0\0'),
    ],
)
def test_broken_bson_is_a_protocol_error(data):
    with pytest.raises(tentacle.ProtocolError):
        tentacle.decode_bson(data)


def test_no_cut_or_flipped_bson_does_anything_but_that():
    whole = tentacle.encode_bson(
        {key: value for document, _ in BSON_TABLE for key, value in document.items()}
    )
    whole = tentacle.encode_bson({'m': [document for document, _ in BSON_TABLE], 'w': whole})
    chance = random.Random(1)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(tentacle.ProtocolError):
            tentacle.decode_bson(
                bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
            )


def nested(depth):
    data = bson()
    for _ in range(depth - 1):
        data = bson(b'\x03a\0' + data)
    return data


def test_bson_budgets():
    assert tentacle.decode_bson(nested(32))
    with pytest.raises(tentacle.ProtocolError, match='within each other'):
        tentacle.decode_bson(nested(33))
    many = tentacle.encode_bson({'a': [None] * 99})
    assert tentacle.decode_bson(many, elements=100)
    with pytest.raises(tentacle.ProtocolError, match='more elements'):
        tentacle.decode_bson(many, elements=99)


# ---- 8. Messages ---------------------------------------------------------------------------------


def captured(name, sender):
    """The BSON bytes of a capture's messages."""
    return [inflated(base64.b64decode(data)) for who, data in CAPTURES[name] if who == sender]


def same_shape(want, got, path=''):
    """Differences of key order and of types between two decoded documents, for all they share."""
    if type(want) is not type(got):
        return (
            []
            if {type(want), type(got)} <= {int, Int64}
            else ['%s: %r, not %r' % (path, got, want)]
        )
    if isinstance(want, dict):
        found = (
            []
            if list(want) == list(got)
            else ['%s: keys %s, not %s' % (path, list(got), list(want))]
        )
        return found + [
            d for key in want for d in same_shape(want[key], got.get(key), path + '.' + key)
        ]
    if isinstance(want, list) and want and got:
        return same_shape(want[0], got[0], path + '[0]')
    return []


def test_our_answers_are_the_originals_byte_for_byte():
    """What the original answered, put into our classes, comes out as the same BSON."""
    for name in CAPTURES:
        for raw in captured(name, 'service'):
            response, _ = tentacle.response_from_message(
                tentacle.message_of(tentacle.decode_bson(raw, encoded=('Logs',)))
            )
            message, _ = tentacle.response_to_message(response)
            assert tentacle.encode_bson({'Message': message}) == raw


def test_our_requests_are_the_originals_byte_for_byte():
    for name in CAPTURES:
        for raw in captured(name, 'client'):
            document = tentacle.decode_bson(raw)['Message']
            request, _ = tentacle.request_from_message(document)
            endpoint = document['endpoint']
            request = request._replace(
                endpoint=tentacle.ServiceEndPoint(endpoint['BaseUri'], endpoint['RemoteThumbprint'])
            )
            message, _ = tentacle.request_to_message(request)
            assert tentacle.encode_bson({'Message': message}) == raw


@pytest.mark.parametrize(
    'text, seconds',
    [
        ('00:00:05', 5),
        ('00:00:00.3000000', 0.3),
        ('24.20:31:23.6470000', 2147483.647),
        ('-1.00:00:00', -86400),
        ('00:00:00', 0),
        ('10675199.02:48:05.4775807', 922337203685.4775807),
    ],
)
def test_time_spans(text, seconds):
    assert tentacle.Span().read(text, []) == pytest.approx(seconds)
    if seconds < 1e9:
        assert tentacle.Span().write(seconds, []) == text


@pytest.mark.parametrize(
    'value', ['', '5', '0:0', 'x', 5, '00:00:00.12345678', '1' * 50 + '.00:00:00', True]
)
def test_what_is_no_time_span(value):
    with pytest.raises(ValueError):
        tentacle.Span().read(value, [])


@pytest.mark.parametrize(
    'value, milliseconds',
    [
        (UtcDate(1795248923704), 1795248923704),
        ('2026-11-21T08:15:23.7040000+00:00', 1795248923704),
        ('2026-11-21T10:15:23.704+02:00', 1795248923704),
        ('2026-11-21T08:15:23Z', 1795248923000),
        ('1969-12-31T23:59:59.9-01:00', 3599900),
    ],
)
def test_dates(value, milliseconds):
    assert tentacle.Instant().read(value, []) == milliseconds


@pytest.mark.parametrize(
    'kind, value, expected',
    [
        (tentacle.Whole(), 7.0, 7),
        (tentacle.Whole(), Int64(7), 7),
        (tentacle.Choice('NoIsolation', 'FullIsolation'), 'fullisolation', 1),
        (tentacle.Choice('NoIsolation', 'FullIsolation'), 1.0, 1),
        (tentacle.TextMap(), {'$type': 'x', 'Bash': 'y'}, {'Bash': 'y'}),
    ],
)
def test_lenient_members(kind, value, expected):
    assert kind.read(value, []) == expected


def read_request(**message):
    document = {'id': 'x', 'service': 's', 'method': 'm', 'params': []}
    document.update(message)
    return tentacle.request_from_message(document)


def test_type_names_as_peers_write_them():
    ticket = 'Octopus.%s.Contracts.ScriptTicket, Octopus.%s'
    for name in (
        ticket % ('Shared', 'Shared'),
        ticket % ('Tentacle', 'Tentacle.Contracts'),
        ticket % ('Shared', 'Shared') + ', Version=1.0.0.0, Culture=neutral, PublicKeyToken=null',
    ):
        request, _ = read_request(params=[{'$type': name, 'taskid': 'T', 'unknown': {'x': [1]}}])
        assert isinstance(request.params[0], tentacle.ScriptTicket)
        assert request.params[0].task_id == 'T'
    message = {
        '$type': tentacle._REQUEST_TYPE + ', Version=8.1.0.0',
        'ID': 'x',
        'Service': 's',
        'METHOD': 'm',
    }
    assert tentacle.request_from_message(message)[0] == tentacle.Request('x', 's', 'm', [])


@pytest.mark.parametrize(
    'message',
    [
        None,
        5,
        [],
        {},
        {'id': 1, 'service': 's', 'method': 'm'},
        {'id': 'x', 'service': 's'},
        {
            '$type': 'Halibut.Transport.Protocol.ResponseMessage, Halibut',
            'id': 'x',
            'service': 's',
            'method': 'm',
        },
        {'$type': 1, 'id': 'x', 'service': 's', 'method': 'm'},
        {'id': 'x', 'service': 's', 'method': 'm', 'params': {}},
        {
            'id': 'x',
            'service': 's',
            'method': 'm',
            'params': [{'$type': 'System.Diagnostics.Process, System'}],
        },
        {
            'id': 'x',
            'service': 's',
            'method': 'm',
            'params': [
                {
                    '$type': 'Octopus.Shared.Contracts.ScriptStatusRequest, Octopus.Shared',
                    'LastLogSequence': 'x',
                }
            ],
        },
        {
            'id': 'x',
            'service': 's',
            'method': 'm',
            'params': [
                {
                    '$type': 'Octopus.Shared.Contracts.ScriptStatusRequest, Octopus.Shared',
                    'Ticket': {'$type': 'Other, X'},
                }
            ],
        },
        {
            'id': 'x',
            'service': 's',
            'method': 'm',
            'params': [{'$type': 'Halibut.DataStream, Halibut', 'id': GUID, 'length': -1}],
        },
    ],
)
def test_messages_outside_the_contracts(message):
    with pytest.raises(tentacle.ProtocolError):
        tentacle.request_from_message(message)


def test_a_document_whose_type_does_not_come_first_stays_a_document():
    parameter = {'TaskId': 'T', '$type': 'Octopus.Shared.Contracts.ScriptTicket, Octopus.Shared'}
    assert read_request(params=[parameter])[0].params == [parameter]


def test_data_streams_are_found_in_the_order_of_the_document():
    first, second, third = (uuid.UUID(int=i) for i in (1, 2, 3))
    file_type = {'Name': 'n', 'Contents': {'id': first, 'length': 1}}
    command = {
        '$type': 'Octopus.Shared.Contracts.StartScriptCommand, Octopus.Shared',
        'Files': [file_type, {'Contents': {'length': Int64(2), 'Id': second}}],
        'ScriptBody': '',
    }
    _, streams = read_request(
        params=[command, {'$type': 'Halibut.DataStream, Halibut', 'id': third, 'length': 3}]
    )
    assert [(stream.id, stream.length) for stream in streams] == [
        (first, 1),
        (second, 2),
        (third, 3),
    ]


LOG_ENTRIES = [
    {'Source': 0, 'Occurred': UtcDate(5), 'Text': 'ü\0\n'},
    {'Source': 2, 'Occurred': UtcDate(-5), 'Text': ''},
    {'Text': 'other order', 'Source': 'StdErr', 'Occurred': '1970-01-01T00:00:00.006Z', 'More': 1},
    {'source': Int64(1), 'OCCURRED': UtcDate(7), 'text': None},
]


def test_log_entries_are_read_in_every_form():
    expected = [(0, 5, 'ü\0\n'), (2, -5, ''), (1, 6, 'other order'), (1, 7, '')]
    whole = tentacle.encode_bson({'Logs': LOG_ENTRIES})
    value = tentacle.decode_bson(whole, encoded=('Logs',))['Logs']
    assert list(tentacle.Log().read(value, [])) == expected
    written = tentacle.Log().write([tentacle.LogEntry(0, 5, 'ü\0\n')], [])
    assert tentacle.encode_bson({'Logs': written}) == tentacle.encode_bson(
        {'Logs': LOG_ENTRIES[:1]}
    )
    assert tentacle.encode_bson({'Logs': tentacle.Log().write([], [])}) == bson(
        b'\x04Logs\0' + bson()
    )


def test_what_follows_the_text_of_an_entry_is_not_text():
    document = tentacle.encode_bson({'Source': 0, 'Occurred': UtcDate(5), 'Text': 'a', 'More': 'b'})
    assert tentacle.decode_entry(document) == (0, 5, 'a')


def test_damaged_log_entries_are_refused_or_read():
    """No cut or flipped byte does anything but a ProtocolError."""
    whole = tentacle.encode_bson({str(i): entry for i, entry in enumerate(LOG_ENTRIES)})[4:-1]
    chance = random.Random(2)
    refused = 0
    for _ in range(5000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        pieces = [bytes(data[i : i + 50]) for i in range(0, len(data), 50)]
        try:
            list(tentacle.LogEntries(tentacle.EncodedArray(len(data), lambda: pieces)))
        except tentacle.ProtocolError:
            refused += 1
    assert refused > 1000


@pytest.mark.parametrize('count', [0, 1, 9, 10, 11, 1234])
@pytest.mark.parametrize('size', [3, 70, 5000])
def test_a_long_array_stays_encoded_however_it_comes(count, size):
    """In memory or in a file; the elements come out as they went in, and what follows is there."""
    entries = [tentacle.LogEntry(i % 3, i, 'x' * size) for i in range(count)]
    logs = tentacle.Log().write(entries, [])
    data = b''.join(tentacle.bson_pieces({'Logs': logs, 'After': 7}))
    pieces = iter([data[i : i + 1000] for i in range(0, len(data), 1000)])
    source = tentacle.ByteSource(more=lambda: next(pieces, b''))
    document = tentacle.read_bson(source, len(data), 10, 5, ('Logs',))
    assert document['After'] == 7
    read = tentacle.LogEntries(document['Logs'])
    assert list(read) == list(read) == entries


def test_secrets_do_not_show():
    secret = tentacle.Secret('hunter2')
    assert 'hunter2' not in '%s %r {}'.format(secret) % (secret, secret)
    assert secret.encode() == b'hunter2'
    document = {'Name': 'n', 'EncryptionPassword': 'hunter2'}
    file = tentacle.ScriptFile.from_document(document, [])
    assert 'hunter2' not in '%s %r' % (file.encryption_password, file.__dict__)


# ---- 9. Message serializer -----------------------------------------------------------------------


def read_document(data, piece=1 << 20, max_bytes=1 << 20, elements=1000):
    stream = ScriptedStream(data, piece)
    return tentacle.read_document(stream, max_bytes, elements), b''.join(
        iter(stream.read_some, b'')
    )


@pytest.mark.parametrize('piece', [1, 7, 1 << 20])
@pytest.mark.parametrize('level', [0, 1, 9])
def test_a_message_gives_back_what_follows_it(piece, level):
    document = {'Message': {'text': 'x' * 1000, 'n': 1}}
    data = deflated(tentacle.encode_bson(document), level) + b'NEXT\r\n'
    got, left = read_document(data, piece)
    assert got == document
    assert left == b'NEXT\r\n'


def test_the_null_message_of_the_original():
    """As the original writes its keep-alive: origin as for CAPTURES, polling-idle-70s."""
    assert read_document(bytes.fromhex('e3636060e0f24d2d2e4e4c4f65600000'))[0] == {'Message': None}
    assert read_document(tentacle.pack_message(None))[0] == {'Message': None}


def test_the_end_of_the_stream():
    assert read_document(b'') == (None, b'')
    with pytest.raises(tentacle.ConnectionLost):
        read_document(tentacle.pack_message(None)[:-2])
    flushed = zlib.compressobj(wbits=-15)
    unfinished = flushed.compress(bson()) + flushed.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(tentacle.ConnectionLost):
        read_document(unfinished)


@pytest.mark.parametrize(
    'data, words',
    [
        (b'\xff' * 50, 'not DEFLATE'),
        (deflated(b'\xff\xff\xff\x7f' + b'\0' * 100), '5 to 1048576 were expected'),
        (deflated(struct.pack('<i', (1 << 20) + 1) + b'\0' * 100), '5 to 1048576 were expected'),
        (deflated(b'\0' * (50 << 20)), '5 to 1048576 were expected'),
        (deflated(struct.pack('<i', 1 << 20) + b'\0' * (50 << 20)), 'BSON'),
        (deflated(bson() + b'\0'), 'after the end'),
        (deflated(b'\5\0'), 'BSON'),
        (b'\0\0\0\xff\xff' * 300000, 'more than 1114112 bytes'),
        (deflated(nested(40)), 'within each other'),
        (deflated(tentacle.encode_bson({'a': [None] * 1001})), 'more elements'),
    ],
)
def test_hostile_messages(data, words):
    with pytest.raises(tentacle.ProtocolError, match=words):
        read_document(data)


def test_a_bomb_is_noticed_before_it_is_inflated():
    """A hundred MB of zeros behind an honest size: memory stays at what was announced."""
    import tracemalloc

    bomb = deflated(struct.pack('<i', 1 << 16) + b'\0' * (100 << 20), 9)
    tracemalloc.start()
    with pytest.raises(tentacle.ProtocolError):
        read_document(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# ---- 10. Identification and control messages -----------------------------------------------------


def walk(*events):
    conversation = tentacle.Conversation()
    for event in events:
        conversation.advance(event)
    return conversation.state


@pytest.mark.parametrize(
    'events',
    [
        'MX-CLIENT MX-SERVER request response NEXT PROCEED request response END',
        'MX-SUBSCRIBER MX-SERVER request response NEXT PROCEED request response END',
    ],
)
def test_legal_conversations(events):
    assert walk(*events.split()) == 'ended'


@pytest.mark.parametrize(
    'events',
    [
        'MX-SERVER',
        'NEXT',
        'request',
        'MX-CLIENT request',
        'MX-CLIENT MX-CLIENT',
        'MX-CLIENT MX-SERVER NEXT',
        'MX-CLIENT MX-SERVER response',
        'MX-CLIENT MX-SERVER request NEXT',
        'MX-CLIENT MX-SERVER request response PROCEED',
        'MX-CLIENT MX-SERVER request response request',
        'MX-CLIENT MX-SERVER request response NEXT END',
        'MX-CLIENT MX-SERVER request response END NEXT',
        'MX-CLIENT MX-SERVER request response HELLO',
    ],
)
def test_illegal_conversations(events):
    *before, last = events.split()
    walk(*before)
    with pytest.raises(tentacle.ProtocolError, match=last + ' came'):
        walk(*(before + [last]))


def test_a_null_request_is_for_polling_alone():
    walk('MX-SUBSCRIBER', 'MX-SERVER', tentacle.KEEP_ALIVE, 'NEXT', 'PROCEED')
    with pytest.raises(tentacle.ProtocolError):
        walk('MX-CLIENT', 'MX-SERVER', tentacle.KEEP_ALIVE)


@pytest.mark.parametrize(
    'line, parsed',
    [
        ('MX-CLIENT 1.0', ('MX-CLIENT', '')),
        ('MX-CLIENT 2.7', ('MX-CLIENT', '')),
        ('MX-SUBSCRIBER 1.0 poll://abc/', ('MX-SUBSCRIBER', 'poll://abc/')),
        ('MX-SERVER 1.0', ('MX-SERVER', '')),
    ],
)
def test_identifications(line, parsed):
    assert tentacle.parse_identification(line) == parsed


@pytest.mark.parametrize(
    'line', ['', 'MX', 'MX-CLIENT', 'mx-client 1.0', 'GET / HTTP/1.1', 'MX-OTHER 1.0']
)
def test_bad_identifications(line):
    with pytest.raises(tentacle.ProtocolError):
        tentacle.parse_identification(line)


@pytest.mark.parametrize(
    'held, end',
    [
        (b'MX\n\n', 4),
        (b'MX\r\n\r\n', 6),
        (b'MX\n\nMX-CLIENT 1.0\r\n\r\n', 4),
        (b'MX\n', 0),
        (b'', 0),
        (b'MX\r\n\r', 0),
        (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', 27),
        (b'HELLO\n\n', 7),
        (b'\n\n', 2),
    ],
)
def test_the_greeting_ends_with_a_blank_line(held, end):
    assert tentacle.end_of_greeting(held) == end


# ---- 11. Message exchange ------------------------------------------------------------------------


def response_bytes(result=None, request_id='x', **members):
    message, _ = tentacle.response_to_message(tentacle.Response(request_id, result))
    message.update(members)
    return deflated(tentacle.encode_bson({'Message': message}))


IDENTIFIED = b'MX-SERVER 1.0\r\n\r\n'


def answering_nothing(request, answer):
    answer(tentacle.Response(request.id))


def test_what_a_client_writes(tmp_path):
    stream = ScriptedStream(
        IDENTIFIED + response_bytes('a') + b'\r\n\r\nPROCEED\r\n' + response_bytes('b'), 3
    )
    exchange = tentacle.MessageExchange(stream, str(tmp_path))
    exchange.as_client()
    request = tentacle.Request('x', 's', 'm', [])
    assert exchange.call(request).result == 'a'
    exchange.go_on()
    assert exchange.call(request).result == 'b'
    exchange.leave()
    packed = tentacle.pack_message(tentacle.request_to_message(request)[0])
    assert stream.written == [
        b'MX\n\n',
        b'MX-CLIENT 1.0\r\n\r\n',
        packed,
        b'NEXT\r\n',
        packed,
        b'END\r\n',
    ]


def test_what_a_service_writes(tmp_path):
    requests = (
        request_bytes('s', 'm', 'one') + b'NEXT\r\n' + request_bytes('s', 'm', 'two') + b'END\r\n'
    )
    stream = ScriptedStream(b'MX-CLIENT 1.0\r\n\r\n' + requests)
    seen = []

    def handle(request, answer):
        seen.append(request.params)
        answer(tentacle.Response(request.id, 'done'))

    tentacle.MessageExchange(stream, str(tmp_path)).as_server(handle)
    answer = tentacle.pack_message(
        tentacle.response_to_message(tentacle.Response('s::m[1] / x', 'done'))[0]
    )
    assert stream.written == [IDENTIFIED, answer, b'PROCEED\r\n', answer]
    assert seen == [['one'], ['two']]


@pytest.mark.parametrize(
    'data',
    [
        b'MX-CLIENT 1.0\r\nrubbish\r\n',
        b'MX-SUBSCRIBER 1.0 poll://x/\r\n\r\n',
        b'MX-SERVER 1.0\r\n\r\n',
        b'HELLO\r\n\r\n',
        b'MX-CLIENT 1.0\r\n\r\n' + b'NEXT\r\n',
        b'MX-CLIENT 1.0\r\n\r\n' + tentacle.pack_message(None),
        b'MX-CLIENT 1.0\r\n\r\n' + request_bytes('s', 'm') + b'PROCEED\r\n',
        b'MX-CLIENT 1.0\r\n\r\n' + request_bytes('s', 'm') + request_bytes('s', 'm'),
    ],
)
def test_a_service_hears_only_what_is_legal(tmp_path, data):
    exchange = tentacle.MessageExchange(ScriptedStream(data), str(tmp_path))
    with pytest.raises((tentacle.ProtocolError, tentacle.ConnectionLost)):
        exchange.as_server(answering_nothing)


def stream_bytes(stream_id, content, length=None, closing=None):
    """A data stream on the wire, honest or not."""
    head = struct.pack('<q', len(content) if length is None else length)
    return (
        stream_id.bytes_le
        + head
        + content
        + (head if closing is None else struct.pack('<q', closing))
    )


@pytest.mark.parametrize('size', [0, 1, 16383, 16384, 65536, 65537, 3 << 20])
def test_data_streams_both_ways(tmp_path, size):
    content = os.urandom(size)
    sent = tentacle.DataStream(size, lambda: io.BytesIO(content))
    writer = ScriptedStream(IDENTIFIED + response_bytes())
    exchange = tentacle.MessageExchange(writer, str(tmp_path))
    exchange.as_client()
    exchange.call(tentacle.Request('x', 's', 'm', ['path', sent]))
    wire = b''.join(writer.written[2:])
    assert wire.endswith(stream_bytes(sent.id, content))

    got = []

    def handle(request, answer):
        with request.params[1].open() as file:
            got.append(file.read())
        with pytest.raises(tentacle.ProtocolError, match='once'):
            request.params[1].open()
        answer(tentacle.Response(request.id))

    reader = ScriptedStream(b'MX-CLIENT 1.0\r\n\r\n' + wire + b'END\r\n', 100000)
    tentacle.MessageExchange(reader, str(tmp_path)).as_server(handle)
    assert got == [content]
    assert os.listdir(str(tmp_path)) == []


def upload_request(length, stream_id=GUID):
    return request_bytes(
        'IFileTransferService', 'UploadFile', 'x', tentacle.DataStream(length, None, stream_id)
    )


@pytest.mark.parametrize(
    'data, words',
    [
        (upload_request(3) + stream_bytes(GUID, b'abc', closing=4), 'length after'),
        (upload_request(3) + stream_bytes(GUID, b'abcd'), 'does not name so'),
        (upload_request(3) + stream_bytes(GUID, b'abc', length=-1), 'does not name so'),
        (upload_request(3) + stream_bytes(uuid.UUID(int=1), b'abc'), 'does not name so'),
        (upload_request(3) + stream_bytes(GUID, b'ab', length=3), 'closed the connection'),
        (upload_request(1 << 60) + stream_bytes(GUID, b'', length=1 << 60), 'nobody takes'),
        (
            upload_request((1 << 63) - 1) + stream_bytes(GUID, b'', length=(1 << 63) - 1),
            'nobody takes',
        ),
    ],
)
def test_lying_data_streams(tmp_path, data, words):
    stream = ScriptedStream(b'MX-CLIENT 1.0\r\n\r\n' + data)
    with pytest.raises((tentacle.ProtocolError, tentacle.ConnectionLost), match=words):
        tentacle.MessageExchange(stream, str(tmp_path)).as_server(answering_nothing)


def test_a_source_that_shrinks_ends_the_connection(tmp_path):
    short = tentacle.DataStream(10, lambda: io.BytesIO(b'only'))
    exchange = tentacle.MessageExchange(ScriptedStream(IDENTIFIED), str(tmp_path))
    exchange.as_client()
    with pytest.raises(tentacle.ConnectionLost, match='shorter'):
        exchange.call(tentacle.Request('x', 's', 'm', [short]))


@pytest.mark.parametrize(
    'answer',
    [
        response_bytes(request_id='other'),
        response_bytes(result=5, id=None),
        tentacle.pack_message(None),
        response_bytes(error='text'),
        request_bytes('s', 'm'),
    ],
)
def test_a_client_takes_no_other_answer(answer):
    exchange = tentacle.MessageExchange(ScriptedStream(IDENTIFIED + answer))
    exchange.as_client()
    with pytest.raises(tentacle.ProtocolError):
        exchange.call(tentacle.Request('x', 's', 'm', []))


# ---- 12. Service invocation ----------------------------------------------------------------------


class Sample:
    @tentacle.exposed('Echo', str)
    def echo(self, text):
        return text

    @tentacle.exposed('Fail', str)
    def fail(self, kind):
        raise {
            'os': OSError(2, 'No such file'),
            'bug': KeyError('x'),
            'ours': tentacle.TentacleError('ours'),
        }[kind]

    def hidden(self):
        raise AssertionError('not to be called')


def invoke(service, method, *params):
    return tentacle.ServiceRegistry({'ISample': Sample()}).invoke(
        tentacle.Request('1', service, method, list(params))
    )


def test_invocation():
    assert invoke('ISample', 'ECHO', 'x') == tentacle.Response('1', 'x')


@pytest.mark.parametrize(
    'call, error_type, message, details',
    [
        (
            ('isample', 'Echo', 'x'),
            None,
            'Error: isample has not been registered through an IAutofacServiceSource',
            '',
        ),
        (('ISample', 'hidden'), tentacle.METHOD_NOT_FOUND, '', ''),
        (('ISample', '__init__'), tentacle.METHOD_NOT_FOUND, '', ''),
        (('ISample', 'Echo'), tentacle.AMBIGUOUS_METHOD, '', ''),
        (('ISample', 'Echo', 1), tentacle.AMBIGUOUS_METHOD, '', ''),
        (('ISample', 'Echo', 'x', 'y'), tentacle.AMBIGUOUS_METHOD, '', ''),
        (('ISample', 'Echo', {'$type': 'x'}), tentacle.AMBIGUOUS_METHOD, '', ''),
        (
            ('ISample', 'Echo', None),
            None,
            '',
            'System.Reflection.TargetInvocationException: Exception has been thrown '
            'by the target of an invocation.',
        ),
        (('ISample', 'Fail', 'os'), None, '', 'System.Reflection.TargetInvocationException: '),
        (
            ('ISample', 'Fail', 'ours'),
            None,
            'ours',
            'System.Reflection.TargetInvocationException: ',
        ),
        (('ISample', 'Fail', 'bug'), None, '', 'System.Reflection.TargetInvocationException: '),
    ],
)
def test_errors_of_invocation(call, error_type, message, details):
    error = invoke(*call).error
    assert error.error_type == error_type
    assert message in str(error)
    assert error.details.startswith(details)


# ---- 13. Script execution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'pieces, lines',
    [
        ([b'a\nb\n'], [b'a', b'b']),
        ([b'a\r\nb'], [b'a', b'b']),
        ([b'a\r', b'\nb\r', b'c'], [b'a', b'b', b'c']),
        ([b'a\r', b'', b'\r\n', b'b'], [b'a', b'', b'b']),
        ([b'a', b'b\n', b'\n'], [b'ab', b'']),
        ([b'\xc3', b'\xbc\n'], ['ü'.encode()]),
        ([b'x' * 25], [b'x' * 10, b'x' * 10, b'x' * 5]),
        ([b'x' * 8, b'x' * 8 + b'\ny'], [b'x' * 10, b'x' * 6, b'y']),
        ([b'a\0\x1b[0mb\n'], [b'a\0\x1b[0mb']),
        ([b''], []),
    ],
)
def test_output_is_cut_into_lines(pieces, lines):
    splitter = tentacle.LineSplitter(limit=10)
    got = [line for piece in pieces for line in splitter.feed(piece)] + splitter.feed(b'', True)
    assert got == lines
    assert bool(splitter.cuts) == (sum(map(len, pieces)) > 12)


@pytest.mark.parametrize(
    'text, arguments',
    [
        ('', []),
        ('one "two words"', ['one', 'two words']),
        ('a\t b', ['a', 'b']),
        ('""', ['']),
        ('"a""b"', ['a"b']),
        (r'\"a\" b\\c', ['"a"', r'b\\c']),
        (r'"a\\" b', ['a\\', 'b']),
        ("'single quotes' $HOME `x`", ["'single", "quotes'", '$HOME', '`x`']),
    ],
)
def test_arguments_are_split_as_dotnet_does(text, arguments):
    assert tentacle.split_arguments(text) == arguments


def write_log(path, source, lines, **options):
    writer = tentacle.LogWriter(str(path), **options)
    writer.append(source, [line.encode() for line in lines])
    return [text for _, text in writer.close()]


def read_log(reader, path, after=0, tail=b''):
    """(the entries of one answer, whether there are more)"""
    array, count, more = reader.read(str(path), after, tail)
    assert sum(map(len, array.pieces())) == array.size
    array = reader.read(str(path), after, tail)[0]
    entries = list(tentacle.LogEntries(array))
    assert len(entries) == count
    return entries, more


def test_a_log_is_read_from_where_one_was(tmp_path):
    path = tmp_path / 'log'
    reader = tentacle.LogReader(LIMITS._replace(log_answer_lines=150))
    assert read_log(reader, path) == ([], False)
    write_log(path, 0, ['line %d' % i for i in range(400)])
    write_log(path, 1, ['odd \n \0 "text" ü'])
    tail = tentacle.encode_entry(2, 1, b'the end')
    got, after = [], 0
    for expected_more in (True, True, False):
        entries, more = read_log(reader, path, after, tail)
        assert more is expected_more
        got += entries
        after += len(entries)
    expected = ['line %d' % i for i in range(400)] + ['odd \n \0 "text" ü', 'the end']
    assert [entry.text for entry in got] == expected
    assert [entry.source for entry in got] == [0] * 400 + [1, 2]
    assert read_log(reader, path, 401, tail)[0][0].text == 'the end'
    assert read_log(reader, path, 402, tail) == read_log(reader, path, 10**12) == ([], False)
    assert read_log(reader, path, 10**12, tail)[0][0].text == 'the end'  # a log that was lost
    assert read_log(reader, path, 0)[0][0].text == 'line 0'


def test_one_entry_is_always_given(tmp_path):
    reader = tentacle.LogReader(LIMITS._replace(log_answer_bytes=10))
    write_log(tmp_path / 'log', 0, ['x' * 100, 'y'])
    assert [entry.text for entry in read_log(reader, tmp_path / 'log')[0]] == ['x' * 100]


def test_an_entry_that_is_being_written_is_left_for_the_next_answer(tmp_path):
    path, reader = tmp_path / 'log', tentacle.LogReader()
    write_log(path, 0, ['one'])
    last = tentacle.encode_entry(0, 1, b'two')
    for size in range(1, len(last)):
        with open(str(path), 'ab') as file:
            file.write(last[size - 1 : size])
        assert [entry.text for entry in read_log(reader, path)[0]] == ['one']
    with open(str(path), 'ab') as file:
        file.write(last[-1:])
    assert [entry.text for entry in read_log(reader, path, 1)[0]] == ['two']


@pytest.mark.parametrize('damage', ['rubbish', 'sparse', 'fifo', 'folder', 'link'])
def test_what_stands_in_the_place_of_a_log_holds_nobody_up(tmp_path, damage):
    path = tmp_path / 'log'
    if damage == 'rubbish':
        path.write_bytes(b'\xff' * 100)
    elif damage == 'sparse':
        with open(str(path), 'wb') as file:
            file.truncate(3 << 30)
    elif damage == 'fifo':
        os.mkfifo(str(path))
    elif damage == 'folder':
        path.mkdir()
    else:
        path.symlink_to('/etc/passwd')
    with contextlib.suppress(OSError):
        assert read_log(tentacle.LogReader(), path) == ([], False)


def test_a_full_disk_loses_whole_lines_and_says_how_many(tmp_path):
    """What of a partial write is whole stays: a reader may have had it."""
    path = tmp_path / 'log'
    writer = tentacle.LogWriter(str(path))
    writer.append(0, [b'before'])
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    entry = len(tentacle.encode_entry(0, 0, b'kept'))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + entry + 20, limits[1]))
    try:
        writer.append(0, [b'kept', b'lost', b'lost too'])
        writer.append(1, [b'and this'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.append(0, [b'after'])
    assert writer.close() == []
    lost = '3 lines were lost here: the log could not be written'
    got = [entry.text for entry in read_log(tentacle.LogReader(), path)[0]]
    assert got == ['before', 'kept', lost, 'after']


def test_a_log_is_bounded(tmp_path):
    path = tmp_path / 'log'
    said = write_log(path, 0, ['x' * 10] * 100, limit=1000)
    kept = read_log(tentacle.LogReader(), path)[0]
    assert path.stat().st_size <= 1000 and len(kept) == 1000 // len(
        tentacle.encode_entry(0, 0, b'x' * 10)
    )
    lost = 100 - len(kept)
    assert said == ['%d lines were not kept: the log of a script has 1000 bytes at most' % lost]


def test_a_log_that_was_removed_is_told_of(tmp_path):
    writer = tentacle.LogWriter(str(tmp_path / 'log'))
    writer.append(0, [b'a', b'b'])
    os.unlink(str(tmp_path / 'log'))
    writer.append(0, [b'c'])
    assert writer.close() == [(1, '3 lines were lost: the log was removed while the script ran')]


def test_reading_a_log_costs_what_is_new(tmp_path, monkeypatch):
    path, reader = tmp_path / 'log', tentacle.LogReader()
    write_log(path, 0, ['line'] * 100000)
    assert len(read_log(reader, path)[0]) == 100000
    write_log(path, 0, ['new'])
    read, original = [], tentacle._read_up_to
    monkeypatch.setattr(
        tentacle,
        '_read_up_to',
        lambda file, size: (read.append(data) or data for data in original(file, size)),
    )
    assert [entry.text for entry in read_log(reader, path, 100000)[0]] == ['new']
    assert sum(map(len, read)) < 1000


@pytest.mark.parametrize(
    'ticket',
    [None, '', '.', '..', '../x', 'a/b', '/etc', 'a\0b', 'x' * 101, '.x', 'a\n', 'ü', 'a b'],
)
def test_tickets_that_can_not_be_a_folder(client, shared_agent, ticket):
    with pytest.raises(tentacle.ServiceError, match='is no script ticket'):
        v2(client, 'StartScript', start_command('true', ticket))
    assert os.listdir(os.path.join(shared_agent.home, 'Work')) == []


def test_a_script_from_start_to_completion(client, shared_agent):
    ticket = tentacle.new_ticket()
    body = 'echo out; echo err >&2\r\nprintf "no end ✓"; pwd > $TentacleHome/where; exit 7'
    status = v2(client, 'StartScript', start_command(body, ticket))
    assert (status.state, status.exit_code, status.ticket.task_id) == (tentacle.COMPLETE, 7, ticket)
    assert texts(status, tentacle.STDOUT) == ['out', 'no end ✓']
    assert texts(status, tentacle.STDERR) == ['err']
    workspace = os.path.join(shared_agent.home, 'Work', ticket)
    assert open_bytes(
        os.path.join(shared_agent.home, 'where')
    ).decode().strip() == os.path.realpath(workspace)
    os.unlink(os.path.join(shared_agent.home, 'where'))
    assert b'\r' not in open_bytes(os.path.join(workspace, 'Bootstrap.sh'))
    assert status.next_log_sequence == len(status.logs)
    assert all(abs(entry.occurred / 1000 - time.time()) < 60 for entry in status.logs)
    assert status.logs[-1].text == 'Process /bin/bash in %s exited with code 7' % workspace
    again = v2(
        client,
        'GetStatus',
        about(tentacle.ScriptStatusRequestV2, ticket, status.next_log_sequence - 1),
    )
    assert [entry.text for entry in again.logs] == [status.logs[-1].text]
    assert v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket)) is None
    assert not os.path.exists(workspace)
    for late in (
        v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket)),
        v2(client, 'CancelScript', about(tentacle.CancelScriptCommandV2, ticket)),
        v2(client, 'StartScript', start_command(body, ticket)),
    ):
        assert (late.state, late.exit_code, late.logs) == (tentacle.COMPLETE, 7, [])
    assert not os.path.exists(os.path.join(shared_agent.home, 'where'))
    assert v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket)) is None


def test_a_start_returns_at_once_when_it_is_not_to_wait(client):
    ticket = tentacle.new_ticket()
    command = start_command('sleep 0.3; exit 3', ticket, duration_to_wait=None)
    status = v2(client, 'StartScript', command)
    assert (status.state, status.exit_code) in [(tentacle.PENDING, 0), (tentacle.RUNNING, 0)]
    assert finished(client, ticket).exit_code == 3
    v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))


def test_the_same_ticket_starts_one_process(shared_agent, keys):
    ticket = tentacle.new_ticket()
    mark = os.path.join(shared_agent.home, 'starts')
    statuses = []

    def start():
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            statuses.append(
                v2(client, 'StartScript', start_command('echo x >> $TentacleHome/starts', ticket))
            )

    threads = [threading.Thread(target=start) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 10
    assert {(status.state, status.exit_code) for status in statuses} == {(tentacle.COMPLETE, 0)}
    assert open_bytes(mark) == b'x\n'
    os.unlink(mark)
    with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
        v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))


CANCEL_BODIES = {
    'obedient': 'echo started; sleep 100',
    'deaf': 'trap "" TERM; echo started; while :; do sleep 1; done',
    'with a child': 'sleep 100 & echo started; wait',
    'with a deaf child': '(trap "" TERM; sleep 100) & echo started; sleep 100',
}


@pytest.mark.parametrize('body', CANCEL_BODIES.values(), ids=list(CANCEL_BODIES))
def test_cancel_ends_the_whole_process_group(client, shared_agent, body):
    ticket = tentacle.new_ticket()
    mark = 'TENTACLE_TEST_%s' % ticket
    v2(
        client,
        'StartScript',
        start_command(
            'export %s=1; exec bash -c %s' % (mark.replace('-', '_'), shlex.quote(body)),
            ticket,
            duration_to_wait=None,
        ),
    )
    eventually(
        lambda: (
            'started'
            in texts(v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket)))
        )
    )
    assert processes_with(mark.replace('-', '_'))
    v2(client, 'CancelScript', about(tentacle.CancelScriptCommandV2, ticket))
    status = finished(client, ticket)
    assert status.exit_code == -1
    assert eventually(lambda: not processes_with(mark.replace('-', '_')))
    v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))


def processes_with(variable):
    """Processes that have a variable in their environment."""
    found = []
    for pid in os.listdir('/proc'):
        with contextlib.suppress(OSError):
            if pid.isdigit() and variable.encode() in open_bytes('/proc/%s/environ' % pid):
                found.append(int(pid))
    return found


def test_a_script_that_dies_by_a_signal(client):
    assert client.run_script('kill -9 $$', lambda line: None) == 137


def test_a_background_child_does_not_delay_the_end(client):
    lines = []
    code = client.run_script('sleep 300 & echo $!; exit 4', lines.append)
    assert code == 4
    child = int([line.text for line in lines if not line.remark][0])
    os.kill(child, signal.SIGKILL)


def test_a_script_has_no_descriptor_of_ours_and_default_signals(client):
    lines = []
    client.run_script(
        'ls /proc/self/fd | wc -l; cat; grep SigIgn /proc/self/status; exec 2>&-', lines.append
    )
    own = [line.text for line in lines if not line.remark]
    assert own[0] == '4'  # 0, 1, 2 and that of ls itself
    # Signals from 32 on are the C library's own: some programs that start us ignore them.
    assert int(own[1].split()[1], 16) & 0x7FFFFFFF == 0


def test_environment_of_a_script(client, shared_agent):
    lines = []
    client.run_script('env', lines.append)
    environment = dict(
        line.text.split('=', 1) for line in lines if not line.remark and '=' in line.text
    )
    assert environment['TentacleHome'] == shared_agent.home
    assert environment['TentacleVersion'] == '9.0.0'
    assert environment['TentaclePyVersion'] == tentacle.__version__
    assert environment['TentacleJournal'] == shared_agent.home + '/DeploymentJournal.xml'
    assert environment['TentacleExecutablePath'] == PROGRAM
    for name in (
        'TentacleApplications',
        'CalamariPackageRetentionJournalPath',
        'TentacleInstanceName',
        'TentacleProgramDirectoryPath',
        'AgentProgramDirectoryPath',
        'TentacleUseDefaultProxy',
        'TentacleProxyHost',
        'TentacleProxyPort',
        'TentacleProxyUsername',
        'TentacleProxyPassword',
    ):
        assert name in environment


def test_files_beside_the_script(client):
    files = [
        tentacle.ScriptFile(
            name=name,
            contents=tentacle.DataStream(len(content), lambda content=content: io.BytesIO(content)),
        )
        for name, content in (('a b.txt', b'small'), ('big', b'x' * 100000))
    ]
    ticket = tentacle.new_ticket()
    status = v2(
        client,
        'StartScript',
        start_command(
            'cat "a b.txt"; echo; wc -c < big; echo "$1|$2"',
            ticket,
            files=files,
            arguments=['"one', 'two"', 'three'],
        ),
    )
    assert texts(status) == ['small', '100000', 'one two|three']
    v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))


@pytest.mark.parametrize(
    'name', ['../x', '/tmp/x', 'a/b', 'a\\b', '..', '.', '', 'a\0b', 'Bootstrap.sh']
)
def test_names_that_lead_out_of_the_workspace(client, shared_agent, name):
    ticket = tentacle.new_ticket()
    file = tentacle.ScriptFile(name=name, contents=tentacle.DataStream(1, lambda: io.BytesIO(b'x')))
    with pytest.raises(tentacle.ServiceError, match='can not be the name of a file'):
        v2(client, 'StartScript', start_command('true', ticket, files=[file]))
    assert ticket not in os.listdir(os.path.join(shared_agent.home, 'Work'))


def test_a_long_log_comes_in_one_answer(client, shared_agent):
    """Complete comes with the last lines; the agent holds none of them."""
    ticket = tentacle.new_ticket()
    status = v2(client, 'StartScript', start_command('seq 1 200000', ticket, duration_to_wait=60.0))
    assert status.state == tentacle.COMPLETE
    assert texts(status) == [str(i) for i in range(1, 200001)]
    completed(client, ticket)
    assert memory_kb(shared_agent.process.pid, 'VmHWM') < 40 << 10


def test_an_answer_is_bounded(tmp_path, keys):
    with listening(tmp_path / 'h', keys['agent'], [keys['server'].thumbprint], log_answer_lines=1000
                   ) as agent:
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            ticket = tentacle.new_ticket()
            status = v2(client, 'StartScript', start_command('seq 1 2500', ticket))
            got = texts(status)
            while status.state != tentacle.COMPLETE:
                assert len(status.logs) == 1000 and status.state == tentacle.RUNNING
                after = status.next_log_sequence
                request = about(tentacle.ScriptStatusRequestV2, ticket, after)
                status = v2(client, 'GetStatus', request)
                got += texts(status)
            assert got == [str(i) for i in range(1, 2501)]
            completed(client, ticket)


def left_of(home):
    """What there is of scripts in a home, but for remembered tickets."""
    home = str(home)
    left = os.listdir(os.path.join(home, 'Work'))
    names = os.listdir(os.path.join(home, 'Scripts'))
    return left + [name for name in names if name not in ('.completed', '.mutex', '.lock')]


def run_times(agent, ticket):
    """How often a script of `counting_script` was run."""
    path = os.path.join(agent.home, 'runs-' + ticket)
    return open_bytes(path).count(b'x') if os.path.exists(path) else 0


def counting_script(ticket, lines=20, pause=0.02):
    """Leaves a mark for each run, prints numbered lines, ends with 17."""
    return (
        'echo x >> $TentacleHome/runs-%s; i=0; while [ $i -lt %d ]; do i=$((i+1)); echo line $i; '
        'sleep %g; done; exit 17' % (ticket, lines, pause)
    )


def in_threads(function, arguments):
    """Call a function for each argument, each in a thread of its own; the results of all."""
    arguments = list(arguments)
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(function, arguments))


def insist(agent_of, keys, ask):
    """Ask until there is an answer: as a client does whose agent is restarted."""

    def attempt():
        with contextlib.suppress(tentacle.TentacleError, AttributeError):
            with tentacle.TentacleClient(agent_of().endpoint, keys['server']) as client:
                return ask(client)

    return eventually(attempt, 30)


def end_of(agent_of, keys, ticket):
    """(lines, exit code) of a script, asked for in steps with growing numbers; then completed."""
    lines, after = [], 0
    while True:
        request = about(tentacle.ScriptStatusRequestV2, ticket, after)
        status = insist(agent_of, keys, lambda client: v2(client, 'GetStatus', request))
        lines += status.logs
        after = status.next_log_sequence
        if status.state == tentacle.COMPLETE:
            break
    command = about(tentacle.CompleteScriptCommandV2, ticket)
    insist(agent_of, keys, lambda client: v2(client, 'CompleteScript', command) or True)
    return [line.text for line in lines if line.text.startswith('line ')], status.exit_code


NUMBERED = ['line %d' % i for i in range(1, 21)]


def test_scripts_outlive_an_agent_that_is_killed(tmp_path, keys):
    """32 scripts, each at another moment of its life when its agent is killed."""
    chance = random.Random(4)
    for attempt in range(4):
        home = tmp_path / str(attempt)
        agents = [Agent(home, '--trust', keys['server'].thumbprint)]
        tickets = [tentacle.new_ticket() for _ in range(8)]

        def start(ticket):
            command = start_command(counting_script(ticket), ticket, duration_to_wait=None)
            threading.Event().wait(chance.random() * 0.5)
            insist(lambda: agents[-1], keys, lambda client: v2(client, 'StartScript', command))

        starter = threading.Thread(target=in_threads, args=(start, tickets))
        starter.start()
        threading.Event().wait(chance.random() * 0.6)
        agents[-1].stop(signal.SIGKILL)
        if attempt == 3:
            threading.Event().wait(1)  # down when the scripts end
        agents.append(Agent(home, '--trust', keys['server'].thumbprint))
        starter.join()
        try:
            for ticket in tickets:
                assert end_of(lambda: agents[-1], keys, ticket) == (NUMBERED, 17)
                assert run_times(agents[-1], ticket) == 1
            assert os.listdir(os.path.join(agents[-1].home, 'Work')) == []
        finally:
            agents[-1].stop()


def below(pid):
    """The processes below one, children before grandchildren."""
    return tentacle.descendants(pid)


def launchers(agent):
    """The launcher, and the supervisors below it."""
    found = []
    for pid in below(agent.process.pid):
        with contextlib.suppress(OSError):
            if b'tentacle.py launcher' in open_bytes('/proc/%d/cmdline' % pid):
                found.append(pid)
    return found


def kill_one_of(agent, chance):
    """Kill the launcher, or a supervisor that waits for a request; whether there was one."""
    victims = launchers(agent)
    with contextlib.suppress(IndexError, OSError):
        pid = chance.choice([victims[0], victims[-1]])
        if pid != victims[0]:
            os.kill(pid, signal.SIGSTOP)  # so that it takes no request while we look
            names = os.listdir('/proc/%d/fd' % pid)
            held = [os.readlink('/proc/%d/fd/%s' % (pid, name)) for name in names]
            if any('Scripts' in path for path in held):
                os.kill(pid, signal.SIGCONT)
                return False
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def test_scripts_outlive_a_launcher_that_is_killed(tmp_path, keys):
    """24 scripts while launchers and the supervisors in waiting are killed all the time."""
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint)
    chance = random.Random(5)
    done = threading.Event()
    kills = []

    def kill():
        while len(kills) < 20 and not done.wait(0.15 + chance.random() * 0.2):
            if kill_one_of(agent, chance):
                kills.append(1)

    def start(ticket):
        command = start_command(counting_script(ticket), ticket, duration_to_wait=None)
        threading.Event().wait(chance.random() * 5)
        insist(lambda: agent, keys, lambda client: v2(client, 'StartScript', command))

    tickets = [tentacle.new_ticket() for _ in range(24)]
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        in_threads(start, tickets)
        for ticket in tickets:
            assert end_of(lambda: agent, keys, ticket) == (NUMBERED, 17)
            assert run_times(agent, ticket) == 1
    finally:
        done.set()
        killer.join()
        agent.stop()
    assert len(kills) >= 8


def test_a_killed_supervisor_leaves_an_unknown_result_and_the_log_so_far(shared_agent, keys):
    tickets = [tentacle.new_ticket() for _ in range(20)]
    chance = random.Random(6)

    def play(ticket):
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            body = 'echo $PPID; %s' % counting_script(ticket, 200)
            v2(client, 'StartScript', start_command(body, ticket, duration_to_wait=None))
            status = eventually(
                lambda: (lambda status: status if texts(status) else None)(
                    v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket))
                )
            )
            threading.Event().wait(chance.random() * 0.3)
            os.kill(int(texts(status)[0]), signal.SIGKILL)
            last = finished(client, ticket)
            assert last.exit_code == -46
            got = [text for text in texts(last) if text.startswith('line')]
            assert got == ['line %d' % i for i in range(1, len(got) + 1)]
            v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))
            outcomes.append(ticket)

    outcomes = []
    in_threads(play, tickets)
    assert sorted(outcomes) == sorted(tickets)
    for ticket in tickets:
        os.unlink(os.path.join(shared_agent.home, 'runs-' + ticket))


def test_agent_and_supervisors_killed_together_run_nothing_again(tmp_path, keys):
    """20 scripts whose supervisors die while no agent looks: unknown results, and one run each."""
    home = tmp_path / 'home'
    agent = Agent(home, '--trust', keys['server'].thumbprint)
    tickets = [tentacle.new_ticket() for _ in range(20)]

    def start(ticket):
        body = 'echo $PPID > $TentacleHome/parent-%s; %s' % (ticket, counting_script(ticket, 1000))
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            v2(client, 'StartScript', start_command(body, ticket, duration_to_wait=None))
        eventually(lambda: run_times(agent, ticket))

    in_threads(start, tickets)
    agent.stop(signal.SIGKILL)
    for ticket in tickets:
        os.kill(int(open_bytes(str(home / ('parent-' + ticket)))), signal.SIGKILL)
    agent = Agent(home, '--trust', keys['server'].thumbprint)
    try:
        for ticket in tickets:
            lines, exit_code = end_of(lambda: agent, keys, ticket)
            assert exit_code == -46 and lines == ['line %d' % i for i in range(1, len(lines) + 1)]
            assert run_times(agent, ticket) == 1
    finally:
        agent.stop()


@pytest.mark.parametrize('victim', ['agent', 'launcher'])
def test_the_mutex_is_held_and_waited_for_across_a_kill(tmp_path, keys, victim):
    """20 pairs, each with a mutex of its own: one runs, one waits when somebody is killed."""
    agents = [Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint)]
    pairs = [(tentacle.new_ticket(), tentacle.new_ticket()) for _ in range(20)]
    gate = os.path.join(agents[0].home, 'gate')

    def start(pair):
        with tentacle.TentacleClient(agents[0].endpoint, keys['server']) as client:
            options = {'isolation': 1, 'mutex_name': pair[0], 'duration_to_wait': None}
            first = 'while [ ! -e $TentacleHome/gate ]; do sleep 0.05; done; echo line 1; exit 1'
            v2(client, 'StartScript', start_command(first, pair[0], **options))
            second = '[ -e $TentacleHome/gate ] && echo line 2; exit 2'
            status = v2(client, 'StartScript', start_command(second, pair[1], **options))
            assert status.state == tentacle.PENDING

    in_threads(start, pairs)
    if victim == 'agent':
        agents[0].stop(signal.SIGKILL)
        agents[0] = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint)
    else:
        os.kill(launchers(agents[0])[0], signal.SIGKILL)
    try:
        with tentacle.TentacleClient(agents[0].endpoint, keys['server']) as client:
            for first, second in pairs:
                request = about(tentacle.ScriptStatusRequestV2, second)
                assert v2(client, 'GetStatus', request).state == tentacle.PENDING
        open(gate, 'w').close()
        for first, second in pairs:
            assert end_of(lambda: agents[0], keys, first) == (['line 1'], 1)
            assert end_of(lambda: agents[0], keys, second) == (['line 2'], 2)
    finally:
        agents[0].stop()


def test_a_kill_during_complete_leaves_all_or_nothing(tmp_path, keys):
    """Each ticket has its true result after that, and is not run again."""
    tickets = [tentacle.new_ticket() for _ in range(20)]
    agents = [Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint)]

    def start(ticket):
        with tentacle.TentacleClient(agents[0].endpoint, keys['server']) as client:
            v2(client, 'StartScript', start_command('touch {1..200}; exit 5', ticket))

    def complete(ticket):
        with contextlib.suppress(tentacle.TentacleError):
            with tentacle.TentacleClient(agents[0].endpoint, keys['server']) as client:
                v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))

    in_threads(start, tickets)
    completing = threading.Thread(target=in_threads, args=(complete, tickets))
    completing.start()
    threading.Event().wait(0.05)
    agents[0].stop(signal.SIGKILL)
    completing.join()
    agents.append(Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint))
    try:
        with tentacle.TentacleClient(agents[1].endpoint, keys['server']) as client:
            for ticket in tickets:
                status = v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket))
                assert status.exit_code == 5
                v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))
                again = v2(client, 'StartScript', start_command('exit 6', ticket))
                assert (again.state, again.exit_code) == (tentacle.COMPLETE, 5)
        eventually(lambda: left_of(agents[1].home) == [])
    finally:
        agents[1].stop()


def running(client, ticket):
    """The status of a script once it runs."""

    def ask():
        status = v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket))
        return status if status.state == tentacle.RUNNING else None

    return eventually(ask)


def waiting_script(client, holder_seconds, **options):
    """(ticket of a full one that runs, ticket of one that waits for it)"""
    name = tentacle.new_ticket()
    tickets = tentacle.new_ticket(), tentacle.new_ticket()
    held = {'isolation': 1, 'mutex_name': name, 'duration_to_wait': None}
    body = 'sleep %g' % holder_seconds
    v2(
        client,
        'StartScript',
        start_command(body, tickets[0], **dict(held, task_id='ServerTasks-77')),
    )
    running(client, tickets[0])
    v2(client, 'StartScript', start_command('exit 7', tickets[1], **dict(held, **options)))
    request = about(tentacle.ScriptStatusRequestV2, tickets[1])
    status = eventually(
        lambda: (lambda s: s if len(s.logs) == 6 else None)(v2(client, 'GetStatus', request))
    )
    assert (status.state, status.exit_code) == (tentacle.PENDING, 0)
    assert [entry.text for entry in status.logs][-3::2] == [
        '##octopus[stdout-wait]',
        '##octopus[stdout-default]',
    ]
    assert status.logs[-2].text == (
        'Waiting for the script in task [ServerTasks-77](~/app#/tasks/ServerTasks-77) to finish as '
        'this script requires that no other Octopus scripts are executing on this target at the '
        'same time.'
    )
    return tickets


def completed(client, *tickets):
    for ticket in tickets:
        v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))


def test_waiting_for_the_mutex(client):
    holder, waiter = waiting_script(client, 0.5)
    assert finished(client, waiter).exit_code == 7
    assert finished(client, holder).exit_code == 0
    completed(client, holder, waiter)


def test_the_wait_for_the_mutex_has_a_limit(client):
    holder, waiter = waiting_script(client, 100, mutex_timeout=0.3)
    status = finished(client, waiter)
    assert status.exit_code == -44
    assert [entry.text for entry in status.logs][-2:] == [
        'This task waited more than 0 minutes and timed out. Task '
        '[ServerTasks-77](~/app#/tasks/ServerTasks-77) is still running.',
        'Script execution timed out.',
    ]
    completed(client, waiter, holder)


def test_cancelled_while_waiting(client):
    holder, waiter = waiting_script(client, 100)
    v2(client, 'CancelScript', about(tentacle.CancelScriptCommandV2, waiter))
    status = finished(client, waiter)
    assert status.exit_code == -43
    assert [entry.text for entry in status.logs][-2:] == [
        'This task was canceled before it could start. Task '
        '[ServerTasks-77](~/app#/tasks/ServerTasks-77) is still running.',
        'Script execution canceled.',
    ]
    completed(client, waiter, holder)


def test_no_isolation_runs_beside_no_isolation(client):
    tickets = [tentacle.new_ticket() for _ in range(2)]
    for ticket in tickets:
        command = start_command('sleep 100', ticket, duration_to_wait=None)
        v2(client, 'StartScript', command)
    for ticket in tickets:
        running(client, ticket)
    completed(client, *tickets)


def test_a_child_that_writes_for_ever_does_not_delay_the_end(client):
    ticket = tentacle.new_ticket()
    v2(client, 'StartScript', start_command('yes & exit 3', ticket, duration_to_wait=None))
    request = about(tentacle.ScriptStatusRequestV2, ticket, 10**9)

    def ended():
        status = v2(client, 'GetStatus', request)
        return status if status.state == tentacle.COMPLETE else None

    assert eventually(ended, 5).exit_code == 3
    eventually(lambda: not processes_named('yes'))  # nobody reads: SIGPIPE ends it
    completed(client, ticket)


def test_what_a_process_substitution_writes_is_not_lost(client):
    for _ in range(10):
        lines = []
        client.run_script('exec > >(cat) 2>&1; echo hello; echo world', lines.append)
        assert [line.text for line in lines if not line.remark] == ['hello', 'world']


def processes_named(name):
    found = []
    for pid in os.listdir('/proc'):
        with contextlib.suppress(OSError):
            if pid.isdigit() and open_bytes('/proc/%s/comm' % pid).strip() == name.encode():
                found.append(int(pid))
    return found


def test_a_child_that_is_left_behind_is_marked_in_the_log(client):
    lines = []
    assert client.run_script('sleep 100 & echo $!', lines.append) == 0
    own = [line for line in lines if not line.remark]
    remark = [line for line in lines if 'left behind' in line.text]
    assert len(own) == 1 and [line.source for line in remark] == [tentacle.DEBUG]
    os.kill(int(own[0].text), signal.SIGKILL)


@pytest.mark.parametrize(
    'escape',
    [
        'setsid sleep 1000 &',
        '(setsid sh -c "trap : TERM; sleep 1000; sleep 1000" &);',
        'nohup sh -c "sleep 1000 & sleep 1000" > /dev/null 2>&1 &',
    ],
)
def test_cancel_finds_those_who_left_the_session(client, escape):
    if not os.path.isdir('/proc/self'):
        pytest.skip('there is no /proc here')
    mark = 'MARK' + tentacle.new_ticket()
    ticket = tentacle.new_ticket()
    body = 'export %s=1; %s echo started; sleep 1000' % (mark, escape)
    v2(client, 'StartScript', start_command(body, ticket, duration_to_wait=None))
    request = about(tentacle.ScriptStatusRequestV2, ticket)
    eventually(lambda: 'started' in texts(v2(client, 'GetStatus', request)))
    eventually(lambda: len(processes_with(mark)) >= 2)
    v2(client, 'CancelScript', about(tentacle.CancelScriptCommandV2, ticket))
    assert finished(client, ticket).exit_code == -1
    assert processes_with(mark) == []
    completed(client, ticket)


def test_two_hundred_scripts_at_once(shared_agent, keys):
    results = []

    def run(number):
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            for i in range(number, 200, 20):
                lines = []
                code = client.run_script('echo %d; echo e >&2; exit %d' % (i, i), lines.append)
                own = sorted(line.text for line in lines if not line.remark)
                results.append((i, code, own))

    in_threads(run, range(20))
    assert sorted(results) == [(i, i, sorted([str(i), 'e'])) for i in range(200)]
    assert os.listdir(os.path.join(shared_agent.home, 'Work')) == []
    # The launcher, and a supervisor in waiting:
    eventually(lambda: len(below(shared_agent.process.pid)) <= 2)


def test_files_with_a_password_are_kept_encrypted(client, shared_agent):
    text = 'geheim ✓'.encode()
    contents = tentacle.DataStream(len(text), lambda: io.BytesIO(text))
    file = tentacle.ScriptFile(name='s', contents=contents, encryption_password='pass')
    lines = []
    ticket = tentacle.new_ticket()
    status = v2(
        client, 'StartScript', start_command('head -c 4 s; wc -c < s', ticket, files=[file])
    )
    assert texts(status) == ['IV__36']
    completed(client, ticket)
    assert lines == []


def test_old_scripts_are_cleaned(tmp_path, keys):
    """What nobody completed for a day and is noticed for an hour; nothing that runs or is no
    script.
    """
    home = tmp_path / 'home'
    agent = Agent(home, '--trust', keys['server'].thumbprint)
    old, young, jumped, running_one = (tentacle.new_ticket() for _ in range(4))
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'kept').write_text('')
    with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
        for ticket in (old, young, jumped):
            v2(client, 'StartScript', start_command('ln -s %s link; exit 9' % outside, ticket))
        command = start_command('sleep 1000', running_one, duration_to_wait=None)
        v2(client, 'StartScript', command)
        running(client, running_one)
    agent.stop(signal.SIGKILL)
    work, scripts = home / 'Work', home / 'Scripts'
    (work / 'foreign').mkdir()
    (work / 'original').mkdir()
    (work / 'original' / 'Bootstrap.sh').write_text('')
    (work / '.gone-x').mkdir()
    (work / 'link').symlink_to(str(outside))
    two_days_ago = time.time() - 2 * 86400
    (scripts / old / 'old').write_text('%f' % (time.time() - 7200))
    paths = [scripts / old / 'result', scripts / jumped / 'result', scripts / running_one / 'log']
    for path in paths + [work / 'original' / 'Bootstrap.sh']:
        os.utime(str(path), (two_days_ago, two_days_ago))
    agent = Agent(home, '--trust', keys['server'].thumbprint)
    try:
        left = sorted([young, jumped, running_one, 'foreign', 'link'])
        eventually(lambda: sorted(os.listdir(str(work))) == left)
        assert os.listdir(str(outside)) == ['kept']
        eventually(lambda: (scripts / jumped / 'old').exists())
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            status = v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, old))
            assert (status.exit_code, status.logs) == (9, [])
            completed(client, running_one)
    finally:
        agent.stop()


def test_a_killed_launcher_delays_nobody_while_a_script_runs(client, shared_agent):
    ticket = tentacle.new_ticket()
    v2(client, 'StartScript', start_command('sleep 1000', ticket, duration_to_wait=None))
    for pid in launchers(shared_agent)[:1]:
        os.kill(pid, signal.SIGKILL)
    assert client.run_script('exit 5', lambda line: None) == 5
    completed(client, ticket)


HOPPING = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    end = time.time() + 60
    while time.time() < end:
        if os.fork():
            os._exit(0)
        time.sleep(0.002)
    os._exit(0)
print('started', flush=True)
time.sleep(1000)
"""


def test_cancel_ends_a_process_that_hops_from_fork_to_fork(client):
    mark, ticket = 'MARK' + tentacle.new_ticket(), tentacle.new_ticket()
    body = 'export %s=1; exec %s -c %s' % (mark, sys.executable, shlex.quote(HOPPING))
    v2(client, 'StartScript', start_command(body, ticket, duration_to_wait=None))
    request = about(tentacle.ScriptStatusRequestV2, ticket)
    eventually(lambda: 'started' in texts(v2(client, 'GetStatus', request)))
    v2(client, 'CancelScript', about(tentacle.CancelScriptCommandV2, ticket))
    assert finished(client, ticket).exit_code == -1
    for _ in range(20):
        assert processes_with(mark) == []
    completed(client, ticket)


def test_a_cancel_that_meets_the_start_is_not_lost(shared_agent, keys, client):
    holder = tentacle.new_ticket()
    held = {'isolation': 1, 'mutex_name': holder, 'duration_to_wait': None}
    v2(client, 'StartScript', start_command('sleep 1000', holder, **held))

    def play(number):
        ticket = tentacle.new_ticket()
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as starter:
            command = start_command('exit 9', ticket, **held)
            start = threading.Thread(target=v2, args=(starter, 'StartScript', command))
            start.start()
            with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as canceller:
                cancel = about(tentacle.CancelScriptCommandV2, ticket)
                while v2(canceller, 'CancelScript', cancel).state != tentacle.COMPLETE:
                    pass
                while v2(canceller, 'CancelScript', cancel).exit_code == -45:
                    pass
                assert finished(canceller, ticket).exit_code == -43
                start.join()
                completed(canceller, ticket)
        good.append(number)

    good = []
    in_threads(play, range(20))
    assert len(good) == 20
    completed(client, holder)


SPOILERS = [
    'rm -rf "$PWD"; ln -s "$TentacleHome/outside" "$PWD"',
    'rm -rf "$PWD"; echo x > "$PWD"',
    'rm -rf * .[!.]*',
    'rm -rf "$PWD"',
    'mv "$PWD" "$PWD.moved"; rm -rf "$PWD.moved"',
    'mkdir ro; echo x > ro/f; chmod 555 ro',
    'mkdir -p a/b/c; chmod 0 a/b; chmod 0 a',
]


@pytest.mark.parametrize('spoil', SPOILERS)
def test_a_script_that_spoils_its_workspace_loses_nothing(client, shared_agent, spoil):
    ticket = tentacle.new_ticket()
    outside = pathlib.Path(shared_agent.home) / 'outside'
    outside.mkdir(exist_ok=True)
    (outside / 'kept').write_text('')
    body = 'cd "$PWD"; echo before; %s; echo after; exit 5' % spoil
    status = v2(client, 'StartScript', start_command(body, ticket))
    assert (status.state, status.exit_code, texts(status)) == (2, 5, ['before', 'after'])
    completed(client, ticket)
    assert left_of(shared_agent.home) == [] and (outside / 'kept').exists()
    shutil.rmtree(str(outside))


def test_a_script_that_removes_what_is_known_of_it_still_has_an_end(client, shared_agent):
    """Whole folder, or the log alone: the code is true, and it is said that lines are missing."""
    for name in ('', '/log'):
        ticket = tentacle.new_ticket()
        body = 'echo a; sleep 0.1; rm -rf "$TentacleHome"/Scripts/%s%s; echo b; exit 6'
        body %= (ticket, name)
        v2(client, 'StartScript', start_command(body, ticket, duration_to_wait=None))
        status = eventually(
            lambda: (lambda s: s if s.exit_code == 6 else None)(
                v2(client, 'GetStatus', about(tentacle.ScriptStatusRequestV2, ticket))
            )
        )
        assert 'lines were lost: the log was removed' in status.logs[0].text
        completed(client, ticket)
    assert left_of(shared_agent.home) == []


def test_a_folder_that_is_not_ours_is_left_alone(client, shared_agent):
    precious = os.path.join(shared_agent.home, 'Work', 'precious')
    os.makedirs(os.path.join(precious, 'sub'))
    with pytest.raises(tentacle.ServiceError):
        v2(client, 'StartScript', start_command('true', 'precious'))
    assert os.listdir(precious) == ['sub']
    shutil.rmtree(precious)


#: Scripts and the entries that the original made of their output (captures/vectors/output-lines).
OUTPUT_LINES = [
    ("printf 'a\\rb\\n'", [(0, 'a'), (0, 'b')]),
    ("printf 'a\\r\\nb\\n'", [(0, 'a'), (0, 'b')]),
    ("printf 'a\\r\\r\\nb\\n'", [(0, 'a'), (0, ''), (0, 'b')]),
    ("printf 'a\\n\\rb\\n'", [(0, 'a'), (0, ''), (0, 'b')]),
    ("printf 'a\\r'; sleep 0.5; printf '\\nb\\n'", [(0, 'a'), (0, 'b')]),
    ("printf 'a\\r'", [(0, 'a')]),
    ("printf 'a\\nb'", [(0, 'a'), (0, 'b')]),
    ("printf 'a'; sleep 0.5; printf 'b\\n'", [(0, 'ab')]),
    ("printf '\\n\\na\\n\\n'", [(0, ''), (0, ''), (0, 'a'), (0, '')]),
    ("printf '  a \\t\\n \\n'", [(0, '  a \t'), (0, ' ')]),
    ("printf 'a\\0b\\n'", [(0, 'a\x00b')]),
    ("printf 'a\\xff\\xfeb\\xc3\\n'", [(0, 'a��b�')]),
    ("printf 'a\\xc3'; sleep 0.5; printf '\\xa4\\n'", [(0, 'aä')]),
    ("printf '\\xef\\xbb\\xbfa\\n\\xef\\xbb\\xbfb\\n'", [(0, '\ufeffa'), (0, '\ufeffb')]),
    ("printf 'a\\xc2\\x85b\\xe2\\x80\\xa8c\\fd\\ve\\n'", [(0, 'a\x85b\u2028c\x0cd\x0be')]),
    ("printf '\\033[31mred\\033[0m\\n'", [(0, '\x1b[31mred\x1b[0m')]),
    ("printf '\\xed\\xa0\\x80\\n'", [(0, '���')]),
    ("printf '\\xf0\\x9f\\x90\\x99\\n'", [(0, '🐙')]),
    ('head -c 75000 /dev/zero | base64 -w0; echo', [(0, 'A' * 100000)]),
    ("printf 'x\\ry\\n' >&2", [(1, 'x'), (1, 'y')]),
]


def test_lines_are_the_originals(shared_agent, keys):
    def lines_of(script):
        lines = []
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            client.run_script(script, lines.append)
        return [(line.source, line.text) for line in lines if not line.remark]

    got = in_threads(lines_of, [script for script, _ in OUTPUT_LINES])
    for (script, expected), lines in zip(OUTPUT_LINES, got):
        assert lines == expected, script


def test_a_line_of_ten_megabytes_is_whole_and_a_longer_one_is_cut(client):
    lines = []
    body = 'head -c %d /dev/zero | tr "\\0" x; echo; echo y'
    assert client.run_script(body % LIMITS.log_line, lines.append) == 0
    assert [len(line.text) for line in lines if not line.remark] == [LIMITS.log_line, 1]
    lines.clear()
    assert client.run_script(body % (LIMITS.log_line + 5), lines.append) == 0
    assert [len(line.text) for line in lines if not line.remark] == [LIMITS.log_line, 5, 1]
    assert any('too long' in line.text for line in lines if line.remark)


ENLARGED_PIPE = """
import fcntl, os
fcntl.fcntl(1, 1031, 1 << 20)
data = b''.join(b'line %d\\n' % i for i in range(60000))
sent = 0
while sent < len(data):
    sent += os.write(1, data[sent:])
os.kill(os.getpid(), 9)
"""


def test_what_is_in_a_large_pipe_at_the_end_is_read(client):
    lines = []
    body = 'exec %s -c %s' % (sys.executable, shlex.quote(ENLARGED_PIPE))
    assert client.run_script(body, lines.append) == 137
    own = [line.text for line in lines if not line.remark]
    assert own == ['line %d' % i for i in range(60000)]


def spec_of(ticket, body, **members):
    values = dict(task_id='ServerTasks-' + ticket, isolation=0, mutex_name='m', mutex_timeout=0)
    values.update(members)
    return tentacle.ScriptSpec(ticket, body, files=[], arguments='', **values)


@contextlib.contextmanager
def agents_of(home, count=2, **limits):
    """Several agents of one home, in this process; their Scripts."""
    services = [
        tentacle.AgentServices(str(home), limits=LIMITS._replace(**limits)) for _ in range(count)
    ]
    try:
        for one in services:
            one.start()
        yield [one.scripts for one in services]
    finally:
        for one in services:
            one.stop()


def ended(scripts, ticket):
    """(exit code, own lines) of a script once it is complete."""

    def ask():
        status = scripts.status(ticket)
        return status if status and status.state == tentacle.COMPLETE else None

    status = eventually(ask, 20)
    entries = list(tentacle.LogEntries(scripts.log(ticket, 0, status.tail)[0]))
    return status.exit_code, [entry.text for entry in entries]


def test_the_mutex_holds_between_agents_of_a_home(tmp_path):
    gate = tmp_path / 'gate'
    with agents_of(tmp_path / 'home') as (one, other):
        body = 'while [ ! -e %s ]; do sleep 0.02; done; echo first' % gate
        one.start(spec_of('1', body, isolation=1))
        eventually(lambda: one.status('1').state == tentacle.RUNNING)
        other.start(spec_of('2', 'test -e %s && echo second' % gate))
        log = str(tmp_path / 'home' / 'Scripts' / '2' / 'log')
        eventually(lambda: b'[ServerTasks-1]' in open_bytes(log))
        assert one.status('2').state == other.status('2').state == tentacle.PENDING
        gate.write_text('')
        assert 'first' in ended(other, '1')[1]
        code, lines = ended(one, '2')
        assert code == 0 and 'second' in lines
        assert sum('Waiting for the script in task' in line for line in lines) == 1
        one.complete('1'), one.complete('2')
    assert left_of(tmp_path / 'home') == []
    assert os.listdir(str(tmp_path / 'home' / 'agents')) == []


def supervisor_of(home, ticket):
    """The process that has a script of a home in hand."""
    alive = os.path.join(str(home), 'Scripts', ticket, 'alive')
    for pid in os.listdir('/proc'):
        with contextlib.suppress(OSError):
            if pid.isdigit() and b'tentacle.py script' in open_bytes('/proc/%s/cmdline' % pid):
                for name in os.listdir('/proc/%s/fd' % pid):
                    if os.readlink('/proc/%s/fd/%s' % (pid, name)) == alive:
                        return int(pid)


def test_who_takes_the_mutex_ends_what_a_dead_supervisor_left(tmp_path):
    mark = 'MARK' + tentacle.new_ticket()
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        body = 'export %s=1; trap "" TERM; sleep 1000 & sleep 1000 & wait' % mark
        scripts.start(spec_of('dead', body, isolation=1))
        eventually(lambda: len(processes_with(mark)) >= 2)
        body = 'grep -l %s /proc/[0-9]*/environ 2> /dev/null' % mark
        scripts.start(spec_of('next', body, isolation=1))
        os.kill(eventually(lambda: supervisor_of(tmp_path / 'home', 'dead')), signal.SIGKILL)
        code, lines = ended(scripts, 'next')
        assert code != 0 and not any('environ' in line for line in lines)
        assert processes_with(mark) == []
        code, lines = ended(scripts, 'dead')
        assert code == -46 and 'is unknown' in lines[-1] and 'may still run' not in lines[-1]
        scripts.complete('dead'), scripts.complete('next')


def test_what_can_not_be_ended_is_said(tmp_path, monkeypatch):
    """As where there is no /proc."""
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts.start(spec_of('t', 'echo $$; sleep 1000'))
        pid = eventually(lambda: supervisor_of(tmp_path / 'home', 't'))
        eventually(lambda: scripts.status('t').state == tentacle.RUNNING)
        started = str(tmp_path / 'home' / 'Scripts' / 't' / 'started')
        session = eventually(lambda: open_bytes(started).split()[0].strip(b'?'))
        monkeypatch.setattr(tentacle, 'process_facts', lambda pid: [])
        os.kill(pid, signal.SIGKILL)
        code, lines = ended(scripts, 't')
        assert code == -46 and 'may still run' in lines[-1]
        os.killpg(int(session), signal.SIGKILL)
        scripts.complete('t')


def test_a_session_of_another_process_is_left_alone(tmp_path):
    """Its number was ours once: the leader began at another time, or the machine was booted."""
    other = subprocess.Popen(['sleep', '1000'], start_new_session=True)
    try:
        facts = tentacle.session_facts(other.pid).split()
        path = tmp_path / 'started'
        for changed in ([facts[0], b'1', facts[2]], [facts[0], facts[1], b'another-boot']):
            path.write_bytes(b' '.join(changed))
            assert tentacle.end_session(str(path)) is True and other.poll() is None
        path.write_bytes(b' ' * 200)
        assert tentacle.end_session(str(path)) is True and other.poll() is None
        path.write_bytes(b' '.join(facts))
        other_thread = threading.Thread(target=other.wait)  # so that it does not stay a zombie
        other_thread.start()
        assert tentacle.end_session(str(path)) is True
        other_thread.join()
        assert other.poll() == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            other.kill()
        other.wait()


def test_a_session_without_its_leader_is_ended_by_its_environment_alone(tmp_path):
    """Its number may be another's by now."""
    folder = tmp_path / 'ticket'
    folder.mkdir()
    started = folder / 'started'
    for mark, is_ended in (('another', False), ('ticket', True)):
        body = 'sleep 1000 > /dev/null & echo $!; read x'
        leader = subprocess.Popen(
            ['bash', '-c', body],
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, TentacleScriptTicket=mark),
        )
        member = int(leader.stdout.readline())
        started.write_bytes(tentacle.session_facts(leader.pid))
        leader.communicate(b'x')
        assert tentacle.end_session(str(started)) is is_ended
        there = lambda: tentacle.process_facts(member)[:1] not in ([], [b'Z'])
        assert there() is not is_ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def test_a_completed_ticket_is_not_claimed_again(tmp_path):
    """By a start that looked at it before it was completed."""
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts.start(spec_of('t', 'exit 3'))
        ended(scripts, 't')
        scripts.complete('t')
        assert scripts._claim('t') is None
        assert left_of(tmp_path / 'home') == []


def test_what_a_pipe_holds_is_taken_whatever_its_size(tmp_path):
    import fcntl

    reader, writer = os.pipe()
    fcntl.fcntl(writer, 1031, 1 << 20)  # F_SETPIPE_SZ
    data = b''.join(b'line %d\n' % i for i in range(60000))
    assert os.write(writer, data) == len(data)
    log = tentacle.LogWriter(str(tmp_path / 'log'))
    tentacle._Pump(reader, 0, log, LIMITS.log_line).take_what_is_there()
    os.close(reader), os.close(writer)
    log.close()
    entries = read_log(tentacle.LogReader(), tmp_path / 'log')[0]
    assert [entry.text for entry in entries] == ['line %d' % i for i in range(60000)]


def test_what_ended_long_ago_has_an_hours_notice(tmp_path):
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts.start(spec_of('t', 'exit 3'))
        ended(scripts, 't')
        folder = tmp_path / 'home' / 'Scripts' / 't'
        os.utime(str(folder / 'result'), (1, 1))
        for _ in range(2):
            scripts.clean(86400)
            assert (folder / 'result').exists()
        (folder / 'old').write_text('%f' % (time.time() - 3700))
        scripts.clean(86400)
        assert not folder.exists() and scripts.status('t').exit_code == 3


def test_too_few_descriptors_say_nothing_about_a_script(tmp_path):
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts.start(spec_of('t', 'sleep 1000'))
        eventually(lambda: scripts.status('t').state == tentacle.RUNNING)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        for call in (scripts.status, scripts.complete, scripts.cancel):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                with pytest.raises(OSError) as caught:
                    call('t')
                with pytest.raises(OSError):
                    tentacle.Liveness(str(tmp_path / 'home' / 'Scripts' / 't' / 'alive'))
                scripts.clean(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert caught.value.errno == errno.EMFILE
            assert scripts.status('t').state == tentacle.RUNNING
        scripts.complete('t')


def in_the_place_of(path, kind):
    """What a hostile script of the same user may put there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'folder':
        os.mkdir(path)
    elif kind == 'link':
        os.symlink('/dev/zero', path)
    else:
        with open(path, 'wb') as file:
            file.truncate(3 << 30)


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'sparse', 'link'])
def test_what_a_script_puts_into_its_folder_holds_nobody_up(tmp_path, kind):
    names = ['request', 'started', 'result', 'alive', 'log', 'old']
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        for name in names:
            scripts.start(spec_of(name, 'exit 3'))
        for name in names:
            ended(scripts, name)
            in_the_place_of(str(tmp_path / 'home' / 'Scripts' / name / name), kind)
            for call in (scripts.status, scripts.cancel, lambda name: scripts.log(name, 0, b'')):
                with contextlib.suppress(OSError):
                    call(name)
        scripts.clean(-1)
        for name in names:
            with contextlib.suppress(OSError):
                scripts.complete(name)
        assert memory_kb(os.getpid()) < 400 << 10


def test_scripts_that_nobody_asks_about_cost_the_agent_nothing(tmp_path):
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts.start(spec_of('first', 'true'))
        before = descriptors(), set(threading.enumerate())
        tickets = ['t-%d' % number for number in range(30)]
        for ticket in tickets:
            scripts.start(spec_of(ticket, 'sleep 1000'))
        assert (descriptors(), set(threading.enumerate())) == before
        for ticket in tickets + ['first']:
            scripts.cancel(ticket)
        for ticket in tickets + ['first']:
            scripts.complete(ticket)
    assert left_of(tmp_path / 'home') == []


@pytest.mark.parametrize('kind', ['flock that grants all', 'flock', 'lockf'])
def test_a_file_system_without_locks_is_said_at_the_start(tmp_path, monkeypatch, kind):
    import fcntl

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    grants = lambda *arguments: None
    monkeypatch.setattr(fcntl, kind.split()[0], grants if ' ' in kind else no_locks)
    services = tentacle.AgentServices(str(tmp_path))
    with pytest.raises(tentacle.TentacleError, match='choose a folder'):
        services.start()


def test_completed_tickets_are_remembered_for_a_day_and_within_a_bound(tmp_path, monkeypatch):
    scripts, now = str(tmp_path), time.time()
    clock = [now]
    monkeypatch.setattr(tentacle.time, 'time', lambda: clock[0])
    for hours in range(30):
        clock[0] = now + hours * 3600
        tentacle.remember_completed(scripts, 'ticket-%d' % hours, hours)
    tentacle.forget_completed(scripts)
    known = [tentacle.completed_exit_code(scripts, 'ticket-%d' % hours) for hours in range(30)]
    assert known[5:] == list(range(5, 30)) and known[:3] == [None] * 3
    tentacle.forget_completed(scripts, LIMITS._replace(remembered_tickets=10))
    known = [tentacle.completed_exit_code(scripts, 'ticket-%d' % hours) for hours in range(30)]
    assert known == [None] * 20 + list(range(20, 30))
    assert tentacle.completed_exit_code(scripts, 'other') is None


def test_a_launcher_that_hangs_is_replaced(tmp_path):
    """Stopped itself, or its supervisor in waiting: neither holds up the next script for long."""
    with agents_of(tmp_path / 'home', 1, launch=0.3) as (scripts,):
        scripts.start(spec_of('first', 'true'))
        ended(scripts, 'first')
        for victim in (0, 1):
            launcher = scripts._launcher._process.pid
            processes = [launcher, eventually(lambda: below(launcher))[0]]
            os.kill(processes[victim], signal.SIGSTOP)
            for number in range(2):
                ticket = '%d-%d' % (victim, number)
                scripts.start(spec_of(ticket, 'exit 4'))
                assert ended(scripts, ticket)[0] == 4
            eventually(lambda: not os.path.exists('/proc/%d/environ' % launcher))


def test_an_agent_that_died_while_it_prepared_a_script_leaves_nothing(tmp_path):
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        folder = tentacle.ScriptFolder(str(tmp_path / 'home' / 'Scripts'), 't')
        hold = folder.make()
        (tmp_path / 'home' / 'Work' / 't').mkdir()
        assert scripts.status('t').state == tentacle.PENDING
        os.close(hold)
        assert scripts.status('t') is None
        assert left_of(tmp_path / 'home') == []
        scripts.start(spec_of('t', 'exit 8'))
        assert ended(scripts, 't')[0] == 8


def test_a_cancel_ahead_of_the_start_is_kept_without_anybody_alive(tmp_path):
    with agents_of(tmp_path / 'home', 1) as (scripts,):
        scripts._launcher.launch = lambda order: None  # it was lost
        scripts.start(spec_of('t', 'echo no'))
        scripts.cancel('t')
        status = scripts.status('t')
        assert (status.state, status.exit_code) == (tentacle.COMPLETE, -43)
        scripts.complete('t')
    assert left_of(tmp_path / 'home') == []


def test_random_kills(tmp_path):
    """Two agents of a home; launchers, supervisors and whole agents die at random moments. Each
    script runs once, its log is whole, its code true.
    """
    chance, home, runs = random.Random(7), tmp_path / 'home', tmp_path / 'runs'
    runs.mkdir()
    bodies = {
        'instant': ('', [], 3),
        'many': ('seq 1 3000', [str(i) for i in range(1, 3001)], 3),
        'slow': ('for i in 1 2 3 4 5; do echo $i; sleep 0.03; done', list('12345'), 3),
        'wiping': ('echo a; rm -rf *; sleep 0.05; echo b', ['a', 'b'], 3),
    }
    with agents_of(home) as agents:
        for number in range(40):
            kind = chance.choice(sorted(bodies))
            body, lines, code = bodies[kind]
            ticket = '%s-%d' % (kind, number)
            body = 'echo x >> %s/%s; %s; exit %d' % (runs, ticket, body or ':', code)
            scripts, other = chance.sample(agents, 2)
            scripts.start(spec_of(ticket, body, isolation=chance.randint(0, 1)))
            harm = chance.choice(['launcher', 'supervisor', 'nothing'])
            killed = False
            if harm == 'launcher' and scripts._launcher._process:
                scripts._launcher._process.kill()
            elif harm == 'supervisor':
                pid = supervisor_of(home, ticket)
                if pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed = True
            got, told = ended(other, ticket)
            own = [line for line in told if line in lines]
            assert got == code or (killed and got == -46), ticket
            assert own == lines[: len(own)] and (got == -46 or own == lines), ticket
            ran = runs / ticket
            assert (ran.exists() and ran.read_text() == 'x\n') or got == -46, ticket
            scripts.complete(ticket)
    assert left_of(home) == []


# ---- 14. Tentacle services -----------------------------------------------------------------------


def test_capabilities(client):
    assert client.capabilities() == ['IScriptService', 'IFileTransferService', 'IScriptServiceV2']


def test_unknown_tickets(client):
    for method, cls in (
        ('GetStatus', tentacle.ScriptStatusRequestV2),
        ('CancelScript', tentacle.CancelScriptCommandV2),
    ):
        for ticket in ('unknown', '../..', ''):
            status = v2(client, method, about(cls, ticket, 3))
            assert (status.state, status.exit_code, status.logs) == (tentacle.COMPLETE, -45, [])
    assert v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, 'unknown')) is None
    for method, cls in (
        ('GetStatus', tentacle.ScriptStatusRequest),
        ('CancelScript', tentacle.CancelScriptCommand),
        ('CompleteScript', tentacle.CompleteScriptCommand),
    ):
        status = v2(client, method, about(cls, 'unknown', 3), 'IScriptService')
        assert (status.state, status.exit_code) == (tentacle.COMPLETE, 0)


def test_the_older_script_service(client, shared_agent):
    command = tentacle.StartScriptCommand(
        script_body='echo wrong', scripts={'Bash': 'echo "$1"; exit 5'}, arguments=['a1']
    )
    ticket = client.call('IScriptService', 'StartScript', command)
    status = eventually(
        lambda: (lambda s: s if s.state == 2 else None)(
            v2(
                client,
                'GetStatus',
                about(tentacle.ScriptStatusRequest, ticket.task_id),
                'IScriptService',
            )
        )
    )
    assert (status.exit_code, texts(status)) == (5, ['a1'])
    final = v2(
        client,
        'CompleteScript',
        about(tentacle.CompleteScriptCommand, ticket.task_id, status.next_log_sequence),
        'IScriptService',
    )
    assert (final.state, final.exit_code, final.logs) == (tentacle.COMPLETE, 5, [])
    assert ticket.task_id not in os.listdir(os.path.join(shared_agent.home, 'Work'))


def data_stream(content):
    return tentacle.DataStream(len(content), lambda: io.BytesIO(content))


def upload(client, path, content):
    return client.call('IFileTransferService', 'UploadFile', str(path), data_stream(content))


def download(client, path):
    """The content of a file, None when there is none."""
    stream = client.call('IFileTransferService', 'DownloadFile', str(path))
    if stream is None:
        return None
    with stream.open() as file:
        return file.read()


def temporary_files(folder):
    return [name for name in os.listdir(str(folder)) if name.startswith('.tentacle-upload')]


@pytest.mark.parametrize('size', [0, 1, 16383, 16384, 16385, (1 << 20) - 1, 1 << 20, 5000000])
def test_files_of_every_size(client, tmp_path, size):
    path = tmp_path / 'new' / 'folder' / 'file'
    content = os.urandom(size)
    result = upload(client, path, content)
    assert (result.full_path, result.hash, result.length) == (
        str(path),
        hashlib.sha1(content).hexdigest(),
        size,
    )
    assert open_bytes(str(path)) == content == download(client, path)
    assert os.listdir(str(path.parent)) == ['file']


@pytest.mark.parametrize('name', ['a b', 'a"b', "a'b", 'a\nb', 'ünï✓', '-rf', '$(id)', 'x' * 255])
def test_names_of_files(client, shared_agent, tmp_path, name):
    assert upload(client, tmp_path / name, b'new').full_path == str(tmp_path / name)
    assert os.listdir(str(tmp_path)) == [name]
    assert download(client, tmp_path / name) == b'new'


def test_relative_paths_are_under_the_home(client, shared_agent):
    path = os.path.join(shared_agent.home, 'up', 'dir', 'a b.bin')
    assert upload(client, 'up\\dir/./a b.bin', b'x').full_path == path
    assert download(client, 'up/dir\\..\\dir/a b.bin') == b'x'


def test_what_is_not_there_is_null(client, tmp_path):
    (tmp_path / 'file').write_bytes(b'x')
    assert download(client, tmp_path / 'missing') is None
    assert download(client, tmp_path / 'missing' / 'too') is None
    assert download(client, tmp_path / 'file' / 'below') is None


@pytest.mark.parametrize('kind', ['directory', 'slash', 'fifo', 'device', 'nul', 'empty'])
def test_what_is_no_file(client, tmp_path, kind):
    """An error, at once, after which the connection goes on: the bytes were read past."""
    os.mkfifo(str(tmp_path / 'fifo'))
    path = {
        'directory': str(tmp_path),
        'slash': str(tmp_path / 'x') + '/',
        'fifo': str(tmp_path / 'fifo'),
        'device': '/dev/null',
        'nul': 'a\0b',
        'empty': '',
    }[kind]
    client.capabilities()
    ((exchange, _),) = client._pool
    with pytest.raises(tentacle.ServiceError, match='directory|not a file|not the name'):
        upload(client, path, bytes(3 << 20))
    with pytest.raises(tentacle.ServiceError, match='directory|not a file|not the name'):
        download(client, path)
    assert [pooled for pooled, _ in client._pool] == [exchange]
    assert os.listdir(str(tmp_path)) == ['fifo']


def test_too_much_to_read_past_ends_the_connection(tmp_path, keys):
    with listening(
        tmp_path / 'home', keys['agent'], [keys['server'].thumbprint], read_past=1 << 20
    ) as agent:
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            with pytest.raises(tentacle.ServiceError):
                upload(client, tmp_path, bytes(1 << 20))
            with pytest.raises(tentacle.ConnectionLost):
                upload(client, tmp_path, bytes(4 << 20))


def test_an_upload_keeps_mode_owner_and_links(client, tmp_path):
    target, link = tmp_path / 'target', tmp_path / 'link'
    target.write_bytes(b'old')
    os.chmod(str(target), 0o4751)
    if os.geteuid() == 0:
        os.chown(str(target), 12345, 23456)
        os.chmod(str(target), 0o4751)
    link.symlink_to('target')
    before = os.stat(str(target))
    assert upload(client, link, b'new').full_path == str(link)
    after = os.stat(str(target))
    assert target.read_bytes() == b'new' and link.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    upload(client, tmp_path / 'fresh', b'')
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat(str(tmp_path / 'fresh')).st_mode) == 0o666 & ~umask


def test_files_root(tmp_path, keys):
    root, outside = tmp_path / 'root', tmp_path / 'outside'
    for folder in (root, outside):
        folder.mkdir()
    (outside / 'file').write_bytes(b'secret')
    (root / 'out').symlink_to(str(outside))
    (root / 'filelink').symlink_to(str(outside / 'file'))
    (root / 'dangling').symlink_to(str(outside / 'new'))
    (root / 'in').symlink_to('deep')
    with listening(
        tmp_path / 'home', keys['agent'], [keys['server'].thumbprint], files_root=str(root)
    ) as agent:
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            upload(client, root / 'deep' / 'er' / 'file', b'fine')
            assert download(client, root / 'in' / 'er' / 'file') == b'fine'
            for path in (
                outside / 'file',
                root / 'out' / 'file',
                root / 'out' / 'folder' / 'new',
                root / 'filelink',
                root / 'dangling',
                root / '..' / 'outside' / 'file',
                str(root) + '-like/file',
                'in-the-home',
            ):
                with pytest.raises(tentacle.ServiceError, match='is outside .*files-root'):
                    upload(client, path, b'x')
                with pytest.raises(tentacle.ServiceError, match='is outside .*files-root'):
                    download(client, path)
    assert sorted(os.listdir(str(tmp_path))) == ['home', 'outside', 'root']
    assert [(f.name, f.read_bytes()) for f in outside.iterdir()] == [('file', b'secret')]


def test_a_link_that_comes_after_the_look_is_not_followed(tmp_path, monkeypatch):
    root, outside = tmp_path / 'root', tmp_path / 'outside'
    root.mkdir(), outside.mkdir()
    (root / 'link').symlink_to(str(outside))
    journal = tentacle.UploadJournal(str(tmp_path / 'journal'))
    service = tentacle.FileTransferService(str(tmp_path), journal, str(root))
    monkeypatch.setattr(tentacle.os.path, 'realpath', lambda path: path)
    with pytest.raises(OSError):
        service.upload_file(str(root / 'link' / 'file'), data_stream(b'x'))
    with pytest.raises(OSError):
        service.upload_file(str(root / 'link' / 'folder' / 'file'), data_stream(b'x'))
    assert os.listdir(str(outside)) == []


def test_a_connection_that_is_cut_leaves_the_old_file(client, shared_agent, keys, tmp_path):
    """20 random points of an upload, 20 of a download."""
    chance = random.Random(5)
    size = 3 << 20
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    points = [chance.randrange(3000, size + 20000) for _ in range(20)]
    content = os.urandom(size)
    endpoint = shared_agent.endpoint
    with Forwarder(
        shared_agent.port, lambda number: [('cut', True, points[number - 1])]
    ) as between:
        for point in points:
            through = endpoint._replace(uri='https://127.0.0.1:%d/' % between.port)
            with tentacle.TentacleClient(through, keys['server']) as victim:
                try:
                    upload(victim, path, content)
                except tentacle.ConnectionLost:
                    pass
            eventually(lambda: not temporary_files(tmp_path))
            assert path.read_bytes() in (b'old', content)
            if path.read_bytes() == content:
                path.write_bytes(b'old')
    path.write_bytes(content)
    lost = 0
    with Forwarder(
        shared_agent.port, lambda number: [('cut', False, points[number - 1])]
    ) as between:
        for point in points:
            through = endpoint._replace(uri='https://127.0.0.1:%d/' % between.port)
            with tentacle.TentacleClient(through, keys['server']) as victim:
                try:
                    assert download(victim, path) == content
                except tentacle.ConnectionLost:
                    lost += 1
    assert lost
    assert download(client, path) == content


@pytest.mark.parametrize(
    'sent',
    [
        lambda stream: stream_bytes(stream, bytes(100000), closing=99999),
        lambda stream: stream_bytes(stream, bytes(100000), length=99999),
        lambda stream: stream_bytes(stream, bytes(100000), length=-1),
        lambda stream: stream_bytes(uuid.uuid4(), bytes(100000)),
        lambda stream: stream.bytes_le,
    ],
)
def test_lies_about_lengths_leave_the_old_file(shared_agent, keys, tmp_path, sent):
    path = tmp_path / 'file'
    path.write_bytes(b'old')
    stream = tentacle.DataStream(100000)
    with Peer(shared_agent.port, keys['server']) as peer:
        request = request_bytes('IFileTransferService', 'UploadFile', str(path), stream)
        with contextlib.suppress(OSError):  # it may have hung up by now
            peer.sock.sendall(request + sent(stream.id))
            socket.socket.shutdown(peer.sock, socket.SHUT_WR)
        assert peer.is_hung_up_on()
    eventually(lambda: os.listdir(str(tmp_path)) == ['file'])
    assert path.read_bytes() == b'old'


def test_an_agent_killed_during_an_upload(tmp_path, keys):
    path = tmp_path / 'files' / 'file'
    path.parent.mkdir()
    path.write_bytes(b'old')
    agent = Agent(tmp_path / 'agent', '--trust', keys['server'].thumbprint)
    stream = tentacle.DataStream(10 << 20)
    with Peer(agent.port, keys['server']) as peer:
        request = request_bytes('IFileTransferService', 'UploadFile', str(path), stream)
        peer.sock.sendall(request + stream_bytes(stream.id, bytes(5 << 20), length=10 << 20)[:-8])
        eventually(lambda: temporary_files(path.parent))
        agent.stop(signal.SIGKILL)
    assert path.read_bytes() == b'old' and len(temporary_files(path.parent)) == 1
    agent = Agent(tmp_path / 'agent', '--trust', keys['server'].thumbprint)
    assert os.listdir(str(path.parent)) == ['file'] and path.read_bytes() == b'old'
    # One that is still on its way is left alone by an agent of the same home that starts.
    with Peer(agent.port, keys['server']) as peer:
        peer.sock.sendall(request + stream_bytes(stream.id, bytes(5 << 20), length=10 << 20)[:-8])
        eventually(lambda: temporary_files(path.parent))
        services = tentacle.AgentServices(str(tmp_path / 'agent'))
        services.start()
        services.stop()
        assert len(temporary_files(path.parent)) == 1
        peer.sock.sendall(bytes(5 << 20) + struct.pack('<q', 10 << 20))
        assert peer.take_message()['result']['Length'] == 10 << 20
    assert agent.stop() == 0
    assert os.listdir(str(path.parent)) == ['file'] and path.read_bytes() == bytes(10 << 20)
    assert os.listdir(os.path.join(agent.home, '.uploads')) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, keys):
    """A file system of 2 MB where we may mount one, else a quota for the agent's files."""
    folder = tmp_path / 'small'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
    mounted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
        (folder / 'file').write_bytes(b'old')
        with listening(
            tmp_path / 'home', keys['agent'], [keys['server'].thumbprint], spare_disk=-1 << 50
        ) as agent:  # or it would look ahead
            endpoint = tentacle.ServiceEndPoint(
                'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
            )
            with tentacle.TentacleClient(endpoint, keys['server']) as client:
                with pytest.raises(tentacle.ServiceError, match='No space left|too large'):
                    upload(client, folder / 'file', bytes(5 << 20))
                assert os.listdir(str(folder)) == ['file']
                assert (folder / 'file').read_bytes() == b'old'
                upload(client, folder / 'file', b'new')
        with listening(
            tmp_path / 'home', keys['agent'], [keys['server'].thumbprint], spare_disk=1 << 50
        ) as agent:
            endpoint = endpoint._replace(uri='https://127.0.0.1:%d/' % agent.port)
            with tentacle.TentacleClient(endpoint, keys['server']) as client:
                with pytest.raises(tentacle.ServiceError, match='does not fit'):
                    upload(client, folder / 'file', bytes(5 << 20))
        assert (folder / 'file').read_bytes() == b'new'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(['umount', str(folder)], check=True)


def test_three_gigabytes_in_little_memory(client, shared_agent, tmp_path):
    length = 3 << 30
    if shutil.disk_usage(str(tmp_path)).free < length + (1 << 30):
        pytest.skip('the disk is short of 4 GiB')
    with open(str(tmp_path / 'sparse'), 'wb') as file:
        file.truncate(length)
    client.capabilities()
    pid = shared_agent.process.pid
    with open('/proc/%d/clear_refs' % pid, 'w') as file:
        file.write('5')  # the peak starts anew
    before = memory_kb(pid, 'VmRSS')
    with open(str(tmp_path / 'sparse'), 'rb') as file:
        result = client.upload(file, str(tmp_path / 'file'))
    assert result.length == length == os.path.getsize(str(tmp_path / 'file'))
    os.truncate(str(tmp_path / 'file'), 1 << 30)
    with open(os.devnull, 'wb') as file:
        assert client.download(str(tmp_path / 'file'), file).length == 1 << 30
    assert memory_kb(pid, 'VmHWM') - before < 8 << 10
    os.unlink(str(tmp_path / 'file'))


def test_a_download_is_of_the_file_as_it_was_when_opened(client, tmp_path):
    path = tmp_path / 'file'
    content = os.urandom(4 << 20)
    path.write_bytes(content)

    class Replaces(io.BytesIO):
        def write(self, data):
            if not self.tell():
                upload_beside()
            return super().write(data)

    def upload_beside():
        with tentacle.TentacleClient(client.endpoint, client._identity) as other:
            upload(other, path, b'new')

    target = Replaces()
    client.download(str(path), target)
    assert target.getvalue() == content and path.read_bytes() == b'new'


def test_data_streams_in_another_order(tmp_path):
    """Two that come in the wrong order: the one that makes way lies in the spool."""
    contents = [os.urandom(200000), os.urandom(300)]
    streams = [data_stream(content) for content in contents]
    request = request_bytes('s', 'm', *streams)
    wire = [stream_bytes(stream.id, content) for stream, content in zip(streams, contents)]
    for order in (wire, wire[::-1]):
        got = []

        def handle(request, answer):
            for stream in request.params:
                with stream.open() as file:
                    got.append(file.read())
            answer(tentacle.Response(request.id))

        data = b'MX-CLIENT 1.0\r\n\r\n' + request + b''.join(order) + b'END\r\n'
        tentacle.MessageExchange(ScriptedStream(data), str(tmp_path)).as_server(handle)
        assert got == contents
    assert os.listdir(str(tmp_path)) == []


def test_a_stream_that_is_read_in_part_is_read_past(tmp_path):
    content = os.urandom(100000)
    stream = data_stream(content)
    data = request_bytes('s', 'm', stream) + stream_bytes(stream.id, content)
    seen = []

    def handle(request, answer):
        seen.append(len(request.params[0].open().read(777)))
        answer(tentacle.Response(request.id))

    data = b'MX-CLIENT 1.0\r\n\r\n' + data + b'NEXT\r\n' + data + b'END\r\n'
    tentacle.MessageExchange(ScriptedStream(data), str(tmp_path)).as_server(handle)
    assert seen == [777, 777]


@pytest.mark.parametrize('name', CAPTURES)
def test_the_originals_client_is_answered_as_by_the_original(shared_agent, keys, name):
    """Its bytes as captured; our answers have the same keys, types and results."""
    conversation = [(who, base64.b64decode(data)) for who, data in CAPTURES[name]]
    with Peer(shared_agent.port, keys['server']) as peer:
        for i, ((_, sent), (_, expected)) in enumerate(zip(conversation[::2], conversation[1::2])):
            if i:
                peer.go_on()
            got = peer.call(sent)
            want = tentacle.decode_bson(inflated(expected))['Message']
            while got['result'] and got['result'].get('State', want['result'].get('State')) != want[
                'result'
            ].get('State'):
                peer.go_on()  # not so far yet: asked again
                got = peer.call(sent)
            assert same_shape(want, got) == []
            assert got['id'] == want['id']
            if want['result'] and 'State' in want['result']:
                assert got['result']['ExitCode'] == want['result']['ExitCode']
        peer.sock.sendall(b'END\r\n')
        assert peer.is_hung_up_on()

# ---- 14. Tentacle services: agents of a home -----------------------------------------------------


def copied(tmp_path):
    return shutil.copy(PROGRAM, str(tmp_path / 'tentacle.py'))


def test_scripts_are_started_by_the_agents_own_code(tmp_path, keys):
    """Whatever is in the place of its file: rubbish, half of it, nothing."""
    program = copied(tmp_path)
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint, program=program)
    try:
        assert not os.path.exists(str(tmp_path / '__pycache__'))
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            for content in (b'rubbish (', open_bytes(PROGRAM)[:100000], None):
                os.unlink(program)
                if content is not None:
                    pathlib.Path(program).write_bytes(content)
                assert client.run_script('exit 5', lambda line: None) == 5
                os.kill(launchers(agent)[0], signal.SIGKILL)
                assert client.run_script('exit 6', lambda line: None) == 6
    finally:
        assert agent.stop() == 0


def test_sigusr2_starts_the_file_on_the_disk(tmp_path, keys):
    """In the same process, on the same port, if it is one that runs; a script goes on."""
    program = copied(tmp_path)
    arguments = ['--trust', keys['server'].thumbprint]
    agent = Agent(tmp_path / 'home', *arguments, program=program, port=free_port())
    try:
        ticket = tentacle.new_ticket()
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            command = start_command(counting_script(ticket, 40), ticket, duration_to_wait=None)
            v2(client, 'StartScript', command)
            eventually(lambda: run_times(agent, ticket))
        broken = [b'', b'import nothing_of_that_name', b'raise SystemExit(3)']
        for number, content in enumerate(broken):
            pathlib.Path(program).write_bytes(content)
            agent.process.send_signal(signal.SIGUSR2)
            eventually(lambda: agent.log().count('is not taken') > number)
        source = open_bytes(PROGRAM).replace(b"__version__ = '", b"__version__ = '7.7.7-")
        pathlib.Path(program).write_bytes(source)
        agent.process.send_signal(signal.SIGUSR2)
        eventually(lambda: 'tentacle.py 7.7.7-' in agent.log())
        assert end_of(lambda: agent, keys, ticket)[1] == 17
        assert run_times(agent, ticket) == 1
    finally:
        assert agent.stop() == 0


def test_more_signals_end_an_agent_in_good_order(tmp_path, keys):
    """They come as long as it lives."""
    for attempt in range(3):
        agent = Agent(tmp_path / str(attempt))
        while agent.process.poll() is None:
            agent.process.send_signal(signal.SIGINT if attempt % 2 else signal.SIGTERM)
        agent.process.stdout.close()
        assert agent.process.returncode == 0
        assert 'ignored' not in agent.log() and 'Traceback' not in agent.log()


def test_a_second_listening_agent_waits_for_the_first_or_refuses(tmp_path, keys):
    first = Agent(tmp_path / 'home')
    code, out, err = cli('listen', home=tmp_path / 'home')
    since = json.loads(open_bytes('%s/home/agents/%d' % (tmp_path, first.process.pid)).decode())
    assert (since['verb'], since['version']) == ('listen', tentacle.__version__)
    assert code == 1 and 'Another agent listens for' in err
    assert 'listen, process %d, since %s' % (first.process.pid, since['since'][:16]) in err
    ending = threading.Timer(0.3, first.stop)
    ending.start()
    second = Agent(tmp_path / 'home')
    ending.join()
    assert second.stop() == 0
    assert os.listdir(str(tmp_path / 'home' / 'agents')) == ['listening']


def test_who_embeds_a_listener_hears_that_it_ended(tmp_path, keys):
    """The verbs end their process then: one that lives on deaf would be taken for well."""
    ended = threading.Event()
    services = tentacle.AgentServices(str(tmp_path / 'home'))
    agent = tentacle.ListeningTentacle(
        services, keys['agent'], frozenset, port=0, on_failure=ended.set
    )
    agent._listener._handle_request_noblock = lambda: 1 / 0
    agent.start()
    with socket.create_connection(('127.0.0.1', agent.port)):
        assert ended.wait(10)
    agent.stop()


def test_what_a_bare_environment_lacks_is_there_for_scripts(tmp_path, keys):
    """As under systemd, or in a container."""
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint, bare=True)
    try:
        lines = []
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            client.run_script('env', lines.append)
        own = [line.text for line in lines if not line.remark]
        entry = pwd.getpwuid(os.geteuid())
        expected = {'HOME': entry.pw_dir, 'USER': entry.pw_name, 'LOGNAME': entry.pw_name}
        expected.update(TentacleCertificateSignatureAlgorithm='sha256RSA', SHELL=entry.pw_shell)
        for name, value in expected.items():
            assert '%s=%s' % (name, value) in own
        assert any(line.startswith('TentacleNetFrameworkDescription=Python 3.') for line in own)
    finally:
        agent.stop()


def test_a_script_gets_the_descriptors_that_the_agent_was_given(tmp_path, keys):
    """The agent itself takes all that it may have."""
    prefix = ['sh', '-c', 'ulimit -Sn 200; ulimit -Hn 900; exec "$@"', 'sh']
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint, prefix=prefix)
    try:
        lines = []
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            client.run_script('ulimit -Sn; ulimit -Hn', lines.append)
        assert [line.text for line in lines if not line.remark] == ['200', '900']
        limits = open_bytes('/proc/%d/limits' % agent.process.pid).decode()
        assert re.search(r'Max open files +900 +900', limits)
    finally:
        agent.stop()


def test_as_process_1_it_reaps_and_forwards(tmp_path, keys):
    unshare = shutil.which('unshare')
    probe = [unshare or 'false', '--fork', '--pid', '--mount-proc', 'true']
    if unshare is None or subprocess.run(probe, stderr=subprocess.DEVNULL).returncode:
        pytest.skip('no PID namespace may be made here')
    prefix = [unshare, '--fork', '--pid', '--mount-proc', '--kill-child=KILL']
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint, prefix=prefix)
    try:
        lines = []
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
            for _ in range(3):
                client.run_script('(setsid sleep 0.01 &)', lambda line: None)
            client.run_script('sleep 0.1; ps -eo stat=,args=; kill -TERM 1', lines.append)
        own = [line.text for line in lines if not line.remark]
        assert not any(line.startswith('Z') for line in own)
        assert any('tentacle.py script ' in line for line in own)
    except tentacle.TentacleError:
        pass  # it was told to end while it answered
    assert agent.process.wait(20) == 0
    agent.process.stdout.close()
    assert 'Stopping: SIGTERM' in agent.log()


def test_an_agents_titles_and_record(shared_agent, client):
    client.run_script('true', lambda line: None)
    title = open_bytes('/proc/%d/cmdline' % shared_agent.process.pid).rstrip(b'\0')
    assert title == b'tentacle.py listen'
    assert open_bytes('/proc/%d/cmdline' % launchers(shared_agent)[0]).startswith(
        b'tentacle.py launcher\0'
    )


# ---- 15. Listening -------------------------------------------------------------------------------


def test_what_listen_prints(shared_agent, keys):
    assert shared_agent.lines == [
        'Agent will trust Octopus Servers with the thumbprint: ' + keys['server'].thumbprint,
        'listen://[::]:%d/ ... Listener started' % shared_agent.port,
        'Agent listening on: [::]:%d' % shared_agent.port,
    ]


@pytest.mark.parametrize('host', ['127.0.0.1', '::1'])
def test_both_address_families(shared_agent, host):
    try:
        with dial(shared_agent.port, host=host) as sock:
            sock.sendall(b'HELLO\n\n')
            assert received(sock).startswith(b'HTTP/1.0 200 OK\r\n')
    except OSError:
        if host != '::1' or os.path.exists('/proc/net/if_inet6'):
            raise


@pytest.mark.parametrize('asked', [b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'HELLO\n\n', b'\n\n'])
@pytest.mark.parametrize('version', [TLS_1_2, TLS_1_3])
def test_the_welcome_page(shared_agent, asked, version):
    with dial(shared_agent.port, version=version) as sock:
        sock.sendall(asked)
        head, _, page = received(sock).partition(b'\r\n\r\n')
    assert head.split(b'\r\n') == [
        b'HTTP/1.0 200 OK',
        b'Content-Type: text/html; charset=utf-8',
        b'Content-Length: %d' % len(page),
    ]
    assert (
        shared_agent.identity.thumbprint.encode() in page and tentacle.__version__.encode() in page
    )
    assert shared_agent.home.encode() not in page and len(page) < 2000


def test_mx_of_windows_and_all_in_one_piece(shared_agent, keys):
    for greeting in (b'MX\r\n\r\n', b'MX\n\n'):
        with dial(shared_agent.port, keys['server']) as sock:
            sock.sendall(greeting + b'MX-CLIENT 1.0\r\n\r\n')
            assert sock.recv(100) == IDENTIFIED


BREACHES = {
    'greeting': b'M' * 30000,
    'control line': b'MX\n\n' + b'x' * 2000,
    'no identification': b'MX\n\nHELLO 1.0\r\n\r\n',
    'a subscriber': b'MX\n\nMX-SUBSCRIBER 1.0 poll://x/\r\n\r\n',
}


@pytest.mark.parametrize('sent', BREACHES.values(), ids=list(BREACHES))
def test_breaches_ahead_of_a_request(shared_agent, keys, sent):
    before = shared_agent.log()
    with dial(shared_agent.port, keys['server']) as sock:
        sock.sendall(sent)
        assert received(sock) == b''
    line = eventually(
        lambda: [
            line for line in shared_agent.log()[len(before) :].splitlines() if 'protocol' in line
        ]
    )
    assert len(line) == 1


MESSAGE_BREACHES = {
    'not DEFLATE': b'\xff' * 100,
    'too long': deflated(struct.pack('<i', LIMITS.request_bytes + 1)),
    'a bomb': deflated(struct.pack('<i', 1000) + b'\0' * (20 << 20)),
    'nesting': deflated(nested(LIMITS.nesting + 1)),
    'elements': deflated(tentacle.encode_bson({'Message': [None] * LIMITS.request_elements})),
    'a type outside the contracts': request_bytes(
        's', 'm', params=[{'$type': 'System.Object, mscorlib'}]
    ),
    'no message': deflated(bson()),
    'null request': tentacle.pack_message(None),
    'a stream that does not fit': upload_request(1 << 60) + stream_bytes(GUID, b'', length=1 << 60),
    'a stream with another end': upload_request(3) + stream_bytes(GUID, b'abc', closing=9),
    'too many streams': request_bytes(
        's',
        'm',
        *[tentacle.DataStream(0, None, uuid.UUID(int=i)) for i in range(LIMITS.data_streams + 1)],
    ),
    'a line that is none': request_bytes('s', 'm') + b'HELLO\r\n',
}


@pytest.mark.parametrize('sent', MESSAGE_BREACHES.values(), ids=list(MESSAGE_BREACHES))
def test_breaches_of_a_trusted_peer_end_its_connection_alone(shared_agent, keys, sent):
    before = shared_agent.log()
    with Peer(shared_agent.port, keys['server']) as peer:
        with contextlib.suppress(OSError):
            peer.sock.sendall(sent)
        received(peer.sock)
    lines = eventually(
        lambda: [
            line for line in shared_agent.log()[len(before) :].splitlines() if 'protocol' in line
        ]
    )
    assert len(lines) == 1 and 'WARNING 127.0.0.1:' in lines[0] and len(lines[0]) < 500
    with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
        assert client.capabilities()


def test_time_for_a_handshake(tmp_path, keys):
    """TCP alone, TLS without a word, and a word that trickles: each ends when its time is over."""
    with listening(tmp_path, keys['agent'], handshake=0.5) as agent:
        with socket.create_connection(('127.0.0.1', agent.port), 10) as sock:
            assert received(sock) == b''
        with dial(agent.port) as sock:
            assert received(sock) == b''
        with dial(agent.port) as sock:
            started = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() < started + 10:
                    sock.sendall(b'M')
                    sock.settimeout(0.05)
                    try:
                        if not sock.recv(1):
                            break
                    except socket.timeout:
                        pass
            assert time.monotonic() - started < 5


def test_time_without_progress(tmp_path, keys):
    identity = keys['server']
    with listening(tmp_path, keys['agent'], [identity.thumbprint], progress=0.3, idle=0.6) as agent:
        with Peer(agent.port, identity) as peer:
            peer.sock.sendall(request_bytes('s', 'm')[:10])
            assert peer.is_hung_up_on()
        with Peer(agent.port, identity) as peer:
            peer.sock.sendall(
                upload_request(100000) + GUID.bytes_le + struct.pack('<q', 100000) + b'some'
            )
            assert peer.is_hung_up_on()
        with Peer(agent.port, identity) as peer:  # an idle one
            assert peer.is_hung_up_on()


def test_connections_are_bounded(tmp_path, keys):
    identity = keys['server']
    with listening(tmp_path, keys['agent'], [identity.thumbprint], connections=2) as agent:
        with Peer(agent.port, identity), Peer(agent.port, identity):
            with dial(agent.port, identity) as third:
                third.sendall(b'MX\n\nMX-CLIENT 1.0\r\n\r\n')
                assert received(third) == b''

        def served():
            return peer_outcome(agent.port, identity, None) == 'served'

        eventually(served)


def test_fifty_concurrent_clients(shared_agent, keys):
    results = []

    def use():
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            for _ in range(3):
                results.append(
                    len(
                        client.call(
                            'ICapabilitiesServiceV2', 'GetCapabilities'
                        ).supported_capabilities
                    )
                )

    threads = [threading.Thread(target=use) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [3] * 150


def test_a_trusted_client_gets_through_500_half_open_connections(shared_agent, keys):
    held = [socket.create_connection(('127.0.0.1', shared_agent.port), 10) for _ in range(500)]
    try:
        with tentacle.TentacleClient(shared_agent.endpoint, keys['server']) as client:
            assert client.run_script('exit 3', lambda line: None) == 3
    finally:
        for sock in held:
            sock.close()
    tasks = '/proc/%d/task' % shared_agent.process.pid
    if os.path.isdir(tasks):
        eventually(lambda: len(os.listdir(tasks)) < 20)


def test_of_too_many_strangers_the_oldest_goes(tmp_path, keys):
    identity = keys['server']
    with listening(tmp_path, keys['agent'], [identity.thumbprint], strangers=10) as agent:
        held = [socket.create_connection(('127.0.0.1', agent.port), 10) for _ in range(40)]
        try:
            assert received(held[0]) == b''
            assert peer_outcome(agent.port, identity, None) == 'served'
            assert len(agent._listener._strangers) <= 10
        finally:
            for sock in held:
                sock.close()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_clean_stop_frees_the_port_at_once(tmp_path, keys, number):
    agent = Agent(tmp_path / 'home', '--trust', keys['server'].thumbprint)
    with Peer(agent.port, keys['server']) as peer, socket.create_connection(
        ('127.0.0.1', agent.port)
    ):
        assert agent.stop(number) == 0
        assert peer.is_hung_up_on()
    with socket.create_server(('127.0.0.1', agent.port)):
        pass


def test_trust_is_taken_over_while_it_runs(tmp_path, keys):
    agent = Agent(tmp_path / 'home')
    try:
        assert 'trusts no Octopus Server yet' in agent.lines[0]
        thumbprint = keys['server'].thumbprint
        assert peer_outcome(agent.port, keys['server'], None) == 'nothing'
        assert cli('configure', '--trust', thumbprint, home=agent.home)[0] == 0
        assert peer_outcome(agent.port, keys['server'], None) == 'served'
        assert cli('configure', '--remove-trust', thumbprint.lower(), home=agent.home)[0] == 0
        assert peer_outcome(agent.port, keys['server'], None) == 'nothing'
    finally:
        agent.stop()


def test_nothing_wakes_up_when_nothing_happens(shared_agent, client):
    assert client.capabilities()  # an idle connection is open meanwhile

    def switches():
        total = 0
        for task in os.listdir('/proc/%d/task' % shared_agent.process.pid):
            text = open_bytes('/proc/%d/task/%s/status' % (shared_agent.process.pid, task)).decode()
            total += sum(int(n) for n in re.findall(r'ctxt_switches:\s*(\d+)', text))
        return total

    def still():
        before = switches()
        threading.Event().wait(1.5)
        return switches() == before

    eventually(still, 15)


# ---- 16. Polling ---------------------------------------------------------------------------------


def test_the_back_off():
    back_off = tentacle.BackOff(LIMITS, lambda: 0.5)
    assert [back_off.failed(now) for now in (100, 105, 120, 160, 1000)] == [5, 7.5, 30, 90, 120]
    back_off.succeeded()
    assert back_off.failed(1000) == 5


@contextlib.contextmanager
def polled(tmp_path, keys, **limits):
    """A server in this process that `keys['agent']` may poll."""
    limits.setdefault('linger', 0.05)
    server = tentacle.PollingServer(
        keys['server'],
        lambda: frozenset([keys['agent'].thumbprint]),
        port=0,
        limits=LIMITS._replace(**limits),
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def polling(tmp_path, keys, port, host='127.0.0.1', proxy=None, connections=1, **limits):
    """A polling tentacle in this process, of subscription poll://one/."""
    agent = tentacle.PollingTentacle(
        str(tmp_path / 'agent'),
        keys['agent'],
        lambda: frozenset([keys['server'].thumbprint]),
        ['https://%s:%d/' % (host, port)],
        'poll://One',
        connections,
        lambda uri: proxy,
        limits=LIMITS._replace(**limits),
    )
    agent.start()
    try:
        yield agent
    finally:
        agent.stop()


ONE = tentacle.ServiceEndPoint('poll://one/')


def request_of(number):
    """A request for poll://one/ with this id."""
    return tentacle.Request(str(number), 'IScriptServiceV2', 'Nothing', [], uuid.uuid4(), ONE)


@contextlib.contextmanager
def a_proxy(tmp_path, user=None):
    """tinyproxy; skips where there is none."""
    program = shutil.which('tinyproxy')
    if not program:
        pytest.skip('tinyproxy is not installed')
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    lines = ['Port %d' % port, 'Listen 127.0.0.1', 'Timeout 600', 'MaxClients 50']
    if user:
        lines.append('BasicAuth %s %s' % user)
    (tmp_path / 'proxy.conf').write_text('\n'.join(lines) + '\n')
    process = subprocess.Popen(
        [program, '-d', '-c', str(tmp_path / 'proxy.conf')],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers():
        with contextlib.suppress(OSError):
            socket.create_connection(('127.0.0.1', port)).close()
            return True

    try:
        eventually(answers)
        yield tentacle.Proxy(
            '127.0.0.1', port, *((user[0], tentacle.Secret(user[1])) if user else ())
        )
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(
    scope='module',
    params=[
        'listening',
        'listening, IPv6',
        'listening, proxy',
        'listening, proxy with password',
        'polling',
        'polling, IPv6',
        'polling, proxy',
        'polling, proxy with password',
        'polling, serve',
    ],
)
def any_way(request, tmp_path_factory, keys):
    """A function that gives a client for a tentacle, whichever way it is reached."""
    way = request.param
    tmp_path = tmp_path_factory.mktemp('way')
    host = '[::1]' if 'IPv6' in way else '127.0.0.1'
    with contextlib.ExitStack() as stack:
        proxy = None
        if 'proxy' in way:
            user = ('me', 'geheim') if 'password' in way else None
            proxy = stack.enter_context(a_proxy(tmp_path, user))
        if 'listening' in way:
            trusted = [keys['server'].thumbprint]
            agent = stack.enter_context(listening(tmp_path / 'agent', keys['agent'], trusted))
            uri = 'https://%s:%d/' % (host, agent.port)
            endpoint = tentacle.ServiceEndPoint(uri, keys['agent'].thumbprint, proxy)
            client_of = lambda: tentacle.TentacleClient(endpoint, keys['server'])
        else:
            server = stack.enter_context(polled(tmp_path, keys))
            stack.enter_context(polling(tmp_path, keys, server.port, host, proxy, connections=3))
            client_of = lambda: server.client(ONE)
            eventually(lambda: len(server.connections()) == 3)
        if 'serve' in way:
            relay = tentacle.Relay(str(tmp_path / 'sock'), server)
            relay.start()
            stack.callback(relay.stop)
            client_of = lambda: tentacle.RelayedClient(str(tmp_path / 'sock'), ONE, keys['server'])
        with client_of() as client:
            client.run_script(':', print)  # the launcher is there from now on
        yield client_of


def test_scripts_any_way(any_way):
    def script(number):
        lines = []
        with any_way() as client:
            body = 'echo out %d; echo err >&2; echo Grüße ✓; exit %d' % (number, number)
            code = client.run_script(body, lines.append)
        return code, tentacle.ScriptResult(code, lines)

    for number, (code, result) in enumerate(in_threads(script, range(6))):
        assert code == number
        assert (result.stdout, result.stderr) == ('out %d\nGrüße ✓\n' % number, 'err\n')


def test_long_output_any_way(any_way):
    lines = []
    with any_way() as client:
        assert client.run_script('seq 12000', lines.append) == 0
    own = [line.text for line in lines if not line.remark]
    assert own == [str(number) for number in range(1, 12001)]


def test_script_files_any_way(any_way):
    names = ['plain', 'with space', 'Grüße']
    contents = [b'', os.urandom(70000), b'x' * (1 << 20)]
    files = [
        tentacle.ScriptFile(name=name, contents=data_stream(content))
        for name, content in zip(names, contents)
    ]
    lines = []
    with any_way() as client:
        client.run_script('cat plain "with space" Grüße | sha1sum', lines.append, files=files)
    digest = hashlib.sha1(b''.join(contents)).hexdigest()
    assert tentacle.ScriptResult(0, lines).stdout == digest + '  -\n'


def test_cancel_any_way(any_way, tmp_path):
    class Enough(Exception):
        pass

    def stop(line):
        if line.text == 'begun':
            raise Enough

    with any_way() as client:
        with pytest.raises(Enough):
            body = 'echo begun; sleep 1000; touch %s' % shlex.quote(str(tmp_path / 'not'))
            client.run_script(body, stop)
    assert not (tmp_path / 'not').exists()


@pytest.mark.parametrize('size', [0, 1, 16384, 3 << 20])
def test_files_any_way(any_way, tmp_path, size):
    content = os.urandom(size)
    path = tmp_path / 'a ✓ file'
    with any_way() as client:
        result = client.upload(io.BytesIO(content), str(path))
        assert result == (str(path), size, hashlib.sha1(content).hexdigest())
        assert path.read_bytes() == content
        target = io.BytesIO()
        assert client.download(str(path), target) == result
        assert target.getvalue() == content


def test_refused_files_any_way(any_way, tmp_path):
    """The connection stays in use after each."""
    with any_way() as client:
        for _ in range(3):
            with pytest.raises(tentacle.ServiceError, match='directory'):
                upload(client, tmp_path, bytes(100000))
            assert download(client, tmp_path / 'missing') is None


def test_many_connections_drain_one_queue(tmp_path, keys):
    with polled(tmp_path, keys) as server, polling(tmp_path, keys, server.port, connections=5):
        eventually(lambda: len(server.connections()) == 5)
        ran = []

        def run(number):
            with server.client(ONE) as client:
                client.run_script('echo %d' % number, lambda line: None)
                ran.append(number)

        in_threads(run, range(20))
        assert sorted(ran) == list(range(20))


def test_null_requests_keep_a_connection(tmp_path, keys):
    with polled(tmp_path, keys, keep_alive=0.05) as server:
        with polling(tmp_path, keys, server.port):
            (first,) = eventually(server.connections)
            assert first[:2] == ('poll://one/', keys['agent'].thumbprint)
            eventually(lambda: server.connections()[0].last_seen > first.since + 0.3)
            assert server.connections()[0].since == first.since


def test_a_call_that_nobody_fetches(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        with server.client(ONE._replace(queue_timeout=0.1)) as client:
            with pytest.raises(tentacle.NotDelivered, match='has not polled'):
                client.capabilities()
        with polling(tmp_path, keys, server.port):
            eventually(server.connections)
            pinned = ONE._replace(queue_timeout=0.1, thumbprint='0' * 40)
            with server.client(pinned) as client:  # never handed to another
                with pytest.raises(tentacle.NotDelivered, match='pinned is'):
                    client.capabilities()
            with server.client(pinned._replace(thumbprint=keys['agent'].thumbprint)) as client:
                assert client.capabilities()


def test_a_subscription_is_its_tentacles_own(tmp_path, keys):
    trusted = frozenset([keys['agent'].thumbprint, keys['other'].thumbprint])
    server = tentacle.PollingServer(keys['server'], lambda: trusted, port=0)
    server.start()
    with Subscriber(server.port, keys['agent']), Subscriber(server.port, keys['agent']):
        with pytest.raises(EOFError):
            Subscriber(server.port, keys['other'])
        assert len(server.connections()) == 2
    server.stop()


@pytest.mark.parametrize(
    'leave', ['close', 'cut', 'stray bytes', 'END to null', 'bytes after NEXT']
)
def test_a_tentacle_that_leaves_is_missed_at_once(tmp_path, keys, leave):
    with polled(tmp_path, keys, keep_alive=1) as server:
        with Subscriber(server.port, keys['agent']) as peer:
            assert server.connections()
            if 'null' in leave or 'NEXT' in leave:
                assert peer.take_message() is None
                peer.sock.sendall(b'END\r\n' if 'null' in leave else b'NEXT\r\nNEXT\r\n')
            elif leave == 'stray bytes':
                peer.sock.sendall(b'NEXT\r\n')  # not its turn
            elif leave == 'cut':
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            if leave in ('close', 'cut'):
                peer.sock.close()
            eventually(lambda: server.connections() == [], 0.9)


def test_one_that_leaves_in_the_last_moment_takes_nobody_along(tmp_path, keys):
    """Missed by its end, and by a null request that it did not answer, in one turn."""
    with polled(tmp_path, keys, keep_alive=1.5) as server:
        with Subscriber(server.port, keys['agent']) as peer:
            assert peer.take_message() is None
            threading.Event().wait(1.475)
        with Subscriber(server.port, keys['agent']) as peer:
            assert peer.take_message() is None
            peer.sock.sendall(b'NEXT\r\n')
            assert peer.take_line() == b'PROCEED\r\n'


def test_a_null_request_that_is_not_answered(tmp_path, keys):
    with polled(tmp_path, keys, keep_alive=0.2) as server:
        with Subscriber(server.port, keys['agent']) as peer:
            assert peer.take_message() is None
            assert peer.is_hung_up_on()


@pytest.mark.parametrize('pieces', [[b'N', b'EX', b'T\r', b'\n'], [b'\r\n', b'NEXT\r\n']])
def test_an_answer_in_pieces(tmp_path, keys, pieces):
    """To a null request; and a call that comes meanwhile waits for it."""
    with polled(tmp_path, keys, keep_alive=1) as server, server.client(ONE) as client:
        with Subscriber(server.port, keys['agent']) as peer:
            assert peer.take_message() is None
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                called = thread.submit(client.call, 'IScriptServiceV2', 'Nothing')
                for piece in pieces:
                    assert not select.select([peer.sock], [], [], 0.05)[0]
                    peer.sock.sendall(piece)
                assert peer.take_line() == b'PROCEED\r\n'
                peer.answer(peer.take_message())
                assert called.result() is None
                assert peer.take_line() == b'PROCEED\r\n'


def test_a_call_goes_to_the_connection_that_is_alive(tmp_path, keys):
    """One whose network is gone looks connected still: it owes an answer to a null request."""
    with polled(tmp_path, keys, keep_alive=1) as server:
        with Subscriber(server.port, keys['agent']) as dead:
            assert dead.take_message() is None
            with Subscriber(server.port, keys['agent']) as alive:
                alive.answers()
                with server.client(ONE._replace(queue_timeout=0.5)) as client:
                    assert client.call('IScriptServiceV2', 'Nothing') is None
                alive.sock.shutdown(socket.SHUT_RDWR)


def test_a_call_that_meets_a_dead_connection_goes_to_another(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        with Subscriber(server.port, keys['agent']) as dead:
            with Subscriber(server.port, keys['agent']) as alive:
                alive.answers()
                eventually(lambda: len(server._idle) == 2)
                poller = server._subscriptions['poll://one/'].pollers[0]
                poller.stream.has_more = lambda: True  # it ends in this moment
                poller.last_seen += 60
                with server.client(ONE._replace(queue_timeout=5)) as client:
                    assert client.call('IScriptServiceV2', 'Nothing') is None
                assert dead.is_hung_up_on()
                alive.sock.shutdown(socket.SHUT_RDWR)


def test_a_call_behind_another_goes_to_the_next_connection(tmp_path, keys):
    """One thread lingers for two calls that come at once."""
    with polled(tmp_path, keys, linger=5) as server, server.client(ONE) as client:
        call = lambda _=None: client.call('IScriptServiceV2', 'Nothing')
        with Subscriber(server.port, keys['agent']) as first:
            with concurrent.futures.ThreadPoolExecutor(2) as threads:
                eventually(lambda: server._idle)
                before = threads.submit(call)
                first.answer(first.take_message())
                assert first.take_line() == b'PROCEED\r\n'
                before.result()
                with Subscriber(server.port, keys['agent']) as second:
                    eventually(lambda: server._idle)
                    calls = [server.submit(request_of(number))[0] for number in range(2)]
                    requests = [peer.take_message() for peer in (first, second)]
                    first.answer(requests[0])
                    second.answer(requests[1])
                    assert [outcome.result(5).id for outcome in calls] == ['0', '1']


def test_a_call_that_is_withdrawn_leaves_nothing(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        outcome, withdraw = server.submit(request_of(1))
        assert withdraw() and outcome.cancelled()
        assert not server._subscriptions


def test_a_connection_that_came_about_ends_the_back_off(tmp_path, keys, monkeypatch):
    delays = []

    class Noted(tentacle.BackOff):
        def failed(self, now):
            delays.append(super().failed(now))
            return delays[-1]

    monkeypatch.setattr(tentacle, 'BackOff', Noted)
    with polled(tmp_path, keys) as server:
        plan = lambda number: [('cut', False, 4000)] if number <= 3 else []
        with Forwarder(server.port, plan) as between, server.client(ONE) as client:
            with polling(tmp_path, keys, between.port, least_back_off=0.001):
                while between.connections <= 3:
                    with contextlib.suppress(tentacle.ConnectionLost):
                        client.call('ICapabilitiesServiceV2', 'GetCapabilities')
    assert delays[:3] == [0.001] * 3


def test_calls_for_another_thumbprint_do_not_put_off_the_null_request(tmp_path, keys):
    with polled(tmp_path, keys, keep_alive=0.5) as server:
        with Subscriber(server.port, keys['agent']) as peer:
            with server.client(ONE._replace(thumbprint='0' * 40, queue_timeout=0.05)) as client:
                for _ in range(15):
                    with pytest.raises(tentacle.NotDelivered):
                        client.capabilities()
            assert select.select([peer.sock], [], [], 0)[0]


def test_who_takes_an_answer_and_fails_hears_of_it_alone(tmp_path, keys, caplog):
    def fail(response):
        raise OSError(28, 'No space left on device')

    with polled(tmp_path, keys) as server, Subscriber(server.port, keys['agent']) as peer:
        peer.answers()
        with server.client(ONE) as client, pytest.raises(OSError, match='No space'):
            client.call('IScriptServiceV2', 'Nothing', take=fail)
        peer.sock.shutdown(socket.SHUT_RDWR)
    assert 'bug' not in caplog.text


def test_a_tentacle_can_not_say_what_the_relay_says(tmp_path, keys):
    with polled(tmp_path, keys) as server, Subscriber(server.port, keys['agent']) as peer:
        relay = tentacle.Relay(str(tmp_path / 'sock'), server)
        relay.start()
        with tentacle.RelayedClient(str(tmp_path / 'sock'), ONE, keys['server']) as client:
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                called = thread.submit(client.call, 'IScriptServiceV2', 'Nothing')
                error = tentacle.ServiceError('it was not fetched', 'tentacle.py NotDelivered')
                request = peer.take_message()
                response = tentacle.Response(request['id'], error=error)
                message = tentacle.response_to_message(response)[0]
                peer.answer(request, **message)
                with pytest.raises(tentacle.ServiceError):
                    called.result()
        relay.stop()


def test_max_time_bounds_a_silent_server(tmp_path, keys):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        agent = tentacle.PollingTentacle(
            str(tmp_path / 'agent'),
            keys['agent'],
            lambda: frozenset([keys['server'].thumbprint]),
            ['https://127.0.0.1:%d/' % silent.getsockname()[1]] * 3,
            'poll://one/',
        )
        begun = time.monotonic()
        assert agent.run_once(0.5) is False
        assert time.monotonic() - begun < 10  # a handshake may take 60


def test_two_hundred_faults(tmp_path, keys, caplog):
    """Scripts and files over connections that go wrong: a script runs once at most, and just once
    where its outcome came; files are whole or as they were; in the end all is well.
    """
    chance = random.Random(6)

    def plan(number):
        if number > 200:
            return []
        kind = chance.choice(['cut', 'half_close', 'swallow', 'delay', 'trickle'])
        to_server = chance.random() < 0.5
        point = int(2 ** chance.uniform(9, 20))
        return [(kind, to_server, point), ('cut', to_server, point)]

    quick = dict(handshake=3, progress=1, response=2, keep_alive=0.3, request=1, linger=0.05)
    quick.update(reconnect_pause=0.1, reconnect_attempts=20)
    content = os.urandom(1 << 20)
    results, lost = [], []

    def script(client, number):
        mark = tmp_path / ('mark %d' % number)
        lines, outcome = [], 'unknown'
        try:
            body = 'echo x >> %s; echo out; exit 3' % shlex.quote(str(mark))
            assert client.run_script(body, lines.append) == 3
            assert [line.text for line in lines if not line.remark] == ['out']
            outcome = 'ran'
        except tentacle.ConnectionLost as error:
            if isinstance(error, tentacle.NotDelivered) or 'was not started' in str(error):
                outcome = 'not started'
        results.append((outcome, mark))

    def files(client, number):
        path = tmp_path / ('file %d' % number)
        path.write_bytes(b'old')
        try:
            upload(client, path, content)
            results.append(('uploaded', path))
            assert download(client, path) == content
        except tentacle.ConnectionLost:
            lost.append(path)
        assert path.read_bytes() in (b'old', content)

    def work(number):
        with server.client(ONE._replace(queue_timeout=20)) as client:
            while between.connections <= 200:
                number += 10
                (files if number % 3 == 0 else script)(client, number)

    with polled(tmp_path, keys, **quick) as server:
        with Forwarder(server.port, plan) as between:
            quick.update(least_back_off=0.01, most_back_off=0.05)
            with polling(tmp_path, keys, between.port, connections=8, **quick):
                in_threads(work, range(10))
                with server.client(ONE) as client:
                    script(client, 10**6)
                    assert results[-1][0] == 'ran'
                eventually(lambda: not temporary_files(tmp_path))
    assert lost
    for outcome, path in results:
        if outcome == 'uploaded':
            assert path.read_bytes() == content
        else:
            runs = path.read_text().count('x') if path.exists() else 0
            assert runs in {'ran': [1], 'not started': [0], 'unknown': [0, 1]}[outcome]
    assert 'a bug' not in caplog.text


def test_a_server_that_is_not_trusted_gets_no_byte(tmp_path, keys, caplog):
    with polled(tmp_path, keys) as server:
        agent = tentacle.PollingTentacle(
            str(tmp_path / 'agent'),
            keys['agent'],
            lambda: frozenset(['0' * 40]),
            ['https://127.0.0.1:%d/' % server.port],
            'poll://one/',
        )
        assert agent.run_once(5) is False
        assert server.connections() == []
    assert 'configure --trust ' + keys['server'].thumbprint in caplog.text


def test_a_lost_connection_is_dialled_again(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        with Forwarder(
            server.port, lambda number: [('cut', False, 3000)] * (number == 1)
        ) as between:
            with polling(tmp_path, keys, between.port, least_back_off=0.05) as agent:
                with server.client(ONE) as client:
                    results = []
                    while between.connections < 2:
                        with contextlib.suppress(tentacle.ConnectionLost):
                            results.append(client.call('ICapabilitiesServiceV2', 'GetCapabilities'))
                    assert client.capabilities()
            assert agent.servers


def test_dial_now(tmp_path, keys):
    """What SIGHUP does: the back-off ends."""
    with socket.create_server(('127.0.0.1', 0)) as place:
        port = place.getsockname()[1]
    with polling(tmp_path, keys, port) as agent:
        eventually(lambda: agent._changed._waiters)
        trusted = frozenset([keys['agent'].thumbprint])
        server = tentacle.PollingServer(keys['server'], lambda: trusted, port=port)
        server.start()
        agent.dial_now()
        eventually(server.connections, 4)  # the back-off alone takes 5 s
    server.stop()


def test_sighup_has_it_dial_at_once(tmp_path, keys):
    home, log = tmp_path / 'agent', tmp_path / 'log'
    thumbprint = cli('show-thumbprint', home=home)[1].strip()
    with socket.create_server(('127.0.0.1', 0)) as place:
        port = place.getsockname()[1]
    command = ['poll', 'https://127.0.0.1:%d/' % port, '--trust', keys['server'].thumbprint]
    with open(str(log), 'wb') as file:
        process = subprocess.Popen(
            [sys.executable, PROGRAM] + command + ['--home', str(home)],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
    eventually(lambda: b'refuses connections' in log.read_bytes())
    server = tentacle.PollingServer(keys['server'], lambda: frozenset([thumbprint]), port=port)
    server.start()
    process.send_signal(signal.SIGHUP)
    eventually(server.connections, 4)  # the back-off alone takes 5 s
    process.terminate()
    assert process.wait(10) == 0
    server.stop()


def test_once_does_all_work_and_leaves(tmp_path, keys):
    with polled(tmp_path, keys, keep_alive=0.2) as server:
        agent = tentacle.PollingTentacle(
            str(tmp_path / 'agent'),
            keys['agent'],
            lambda: frozenset([keys['server'].thumbprint]),
            ['https://127.0.0.1:%d/' % server.port],
            'poll://one/',
        )
        ended = []
        with server.client(ONE) as client:
            thread = threading.Thread(
                target=lambda: ended.append(
                    client.run_script('sleep 1; echo done', lambda line: None)
                )
            )
            thread.start()
            assert agent.run_once() is True
            thread.join()
        assert ended == [0]
        assert os.listdir(str(tmp_path / 'agent' / 'Work')) == []


def test_what_max_time_leaves_is_taken_up_by_the_next(tmp_path, keys):
    def agent():
        return tentacle.PollingTentacle(
            str(tmp_path / 'agent'),
            keys['agent'],
            lambda: frozenset([keys['server'].thumbprint]),
            ['https://127.0.0.1:%d/' % server.port],
            'poll://one/',
        )

    with polled(tmp_path, keys, keep_alive=0.2) as server:
        lines, codes = [], []
        with server.client(ONE) as client:
            body = 'echo begin; sleep 3; echo end'
            thread = threading.Thread(
                target=lambda: codes.append(client.run_script(body, lines.append))
            )
            thread.start()
            assert agent().run_once(1) is True
            assert codes == []
            assert agent().run_once() is True
            thread.join()
        assert codes == [0]
        assert [line.text for line in lines if not line.remark] == ['begin', 'end']


def test_nobody_waits_for_a_script_that_max_time_left(tmp_path, keys):
    """Cron, or a pipe to a logger, waits until nobody has the standard streams any more."""
    home, go = str(tmp_path / 'agent'), tmp_path / 'go'
    thumbprint = cli('show-thumbprint', home=home)[1].strip()
    limits = LIMITS._replace(keep_alive=0.2, linger=0.05)
    server = tentacle.PollingServer(
        keys['server'], lambda: frozenset([thumbprint]), port=0, limits=limits
    )
    server.start()
    words = ['poll', 'https://127.0.0.1:%d/' % server.port, '--trust', keys['server'].thumbprint]
    words += ['--subscription', 'poll://one/', '--once']
    body = 'echo begun; while [ ! -e %s ]; do sleep 0.05; done' % shlex.quote(str(go))
    with concurrent.futures.ThreadPoolExecutor(1) as thread, server.client(ONE) as client:
        ran = thread.submit(client.run_script, body, print)
        try:
            assert cli(*words, '--max-time', '5', home=home)[0] == 0
            assert not ran.done()
            go.touch()
            assert cli(*words, home=home)[0] == 0
            assert ran.result(60) == 0
        finally:
            go.touch()
            server.stop()  # or who waits for an answer would wait on


CRON_TICKS = 60


def test_cron_life(tmp_path, keys):
    """A stand-in for cron starts `poll --once` each second of a minute, while jobs come in: each
    runs once, no two agents are at it at once, all results come back.
    """
    folder = str(tmp_path)
    home = os.path.join(folder, 'agent')
    _, environment = installed(folder)
    agent = cli('show-thumbprint', home=home)[1].strip()
    limits = LIMITS._replace(keep_alive=0.3)
    server = tentacle.PollingServer(
        keys['server'], lambda: frozenset([agent]), port=0, limits=limits
    )
    server.start()
    command = [sys.executable, '-m', 'tentacle', 'poll', '--once']
    command += ['https://127.0.0.1:%d/' % server.port]
    command += ['--home', home, '--subscription', 'poll://one/']
    command += ['--trust', keys['server'].thumbprint]
    chance = random.Random(7)
    begun = time.monotonic()
    pause = threading.Event().wait

    def job(number):
        pause(chance.uniform(0, CRON_TICKS - 10))
        mark = os.path.join(folder, 'mark %d' % number)
        body = 'echo x >> %s; echo %d' % (shlex.quote(mark), number)
        lines = []
        with server.client(ONE) as client:
            code = client.run_script(('sleep 3; ' if number == 0 else '') + body, lines.append)
        return code, tentacle.ScriptResult(code, lines).stdout, open_bytes(mark).decode()

    ticks, most = [], 0
    with concurrent.futures.ThreadPoolExecutor(25) as threads:
        jobs = [threads.submit(job, number) for number in range(25)]
        for tick in range(CRON_TICKS):
            ticks.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            while time.monotonic() < begun + tick + 1:
                most = max(most, len(server.connections()))
                pause(0.05)
        results = [job.result() for job in jobs]
    codes = [process.wait() for process in ticks]
    server.stop()
    assert results == [(0, '%d\n' % number, 'x\n') for number in range(25)]
    assert most == 1
    assert set(codes) == {0, 75}


@contextlib.contextmanager
def serving(home, *arguments):
    """`tentacle.py serve` as a process; its port."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, 'serve', '--home', str(home), '--port', '0'] + list(arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        line = process.stdout.readline().decode()
        yield int(line.rpartition(':')[2])
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stdout.close()


def test_serve_and_poll_as_commands(tmp_path, keys):
    home, agent_home = tmp_path / 'server', tmp_path / 'agent'
    ours = cli('show-thumbprint', home=home)[1]
    theirs = cli('show-thumbprint', home=agent_home)[1]
    assert cli('trust', 'poll://One/', theirs, home=home)[0] == 0
    code, _, err = cli('exec', 'one', '--', 'x', home=home)
    assert code == 1 and 'start' in err and 'serve' in err
    with serving(home) as port:
        url = 'https://127.0.0.1:%d/' % port
        poll = ['poll', url, '--trust', ours, '--subscription', 'poll://one/', '--once']
        agent = subprocess.Popen(
            [sys.executable, PROGRAM] + poll + ['--max-time', '60', '--home', str(agent_home)],
            stderr=subprocess.DEVNULL,
        )
        try:
            assert cli('exec', 'one', '--', 'echo hi; exit 3', home=home) == (3, 'hi\n', '')
            assert stat.S_IMODE((home / 'serve.sock').stat().st_mode) == 0o600
            assert cli(*poll, home=agent_home)[0] == 75
            (tmp_path / 'in').write_bytes(b'content')
            place = 'poll://one/:%s' % (tmp_path / 'out')
            assert cli('upload', str(tmp_path / 'in'), place, home=home)[0] == 0
            assert cli('download', place, '-', home=home)[1] == 'content'
            code, out, _ = cli('targets', home=home)
            assert code == 0 and 'poll://one/  ' + theirs in out and '127.0.0.1:' in out
            code, _, err = cli('serve', '--port', '0', home=home)
            assert code == 1 and 'runs already' in err
            with dial(port) as browser:
                browser.sendall(b'GET / HTTP/1.1\r\n\r\n')
                assert b'200 OK' in received(browser)
        finally:
            agent.terminate()
            agent.wait()
    assert cli(*poll, home=agent_home)[0] == 1  # nobody there


def test_exec_that_opens_the_port_itself(tmp_path, keys):
    home = tmp_path / 'server'
    cli('show-thumbprint', home=home)
    tentacle.Targets(str(home)).pin('one', ONE._replace(thumbprint=keys['agent'].thumbprint))
    identity = tentacle.load_identity(str(home / 'tentacle.pem'))
    with socket.create_server(('127.0.0.1', 0)) as place:
        port = place.getsockname()[1]
    agent = tentacle.PollingTentacle(
        str(tmp_path / 'agent'),
        keys['agent'],
        lambda: frozenset([identity.thumbprint]),
        ['https://127.0.0.1:%d/' % port],
        'poll://one/',
        limits=LIMITS._replace(least_back_off=0.1),
    )
    agent.start()
    try:
        done = cli('exec', 'one', '--listen-for-polling', str(port), '--', 'echo hi', home=home)
        assert done[:2] == (0, 'hi\n')
    finally:
        agent.stop()


# ---- 17. Dispatcher ------------------------------------------------------------------------------


class FakeTentacle:
    """A listening service in this process: `serve(sock, number)` plays each connection."""

    def __init__(self, identity, serve):
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(identity.path)
        self._server = socket.create_server(('127.0.0.1', 0))
        self._serve = serve
        self.failures = []
        self.connections = 0
        self.port = self._server.getsockname()[1]
        self.endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % self.port, identity.thumbprint
        )
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            try:
                with self._context.wrap_socket(sock, server_side=True) as secure:
                    secure.settimeout(20)
                    self._serve(FakeConnection(secure), self.connections)
            except (OSError, EOFError):
                pass
            except Exception as error:
                self.failures.append(error)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        assert self.failures == []


class FakeConnection(Peer):
    """The service's end of a connection."""

    def __init__(self, sock):
        self.sock = sock
        self._buffer = b''
        lines = [self.take_line() for _ in range(4)]
        assert lines == [b'MX\n', b'\n', b'MX-CLIENT 1.0\r\n', b'\r\n']
        sock.sendall(IDENTIFIED)

    def answer(self, document):
        self.sock.sendall(deflated(tentacle.encode_bson({'Message': document})))

    def proceed(self):
        """Whether the client goes on."""
        if self.take_line() != b'NEXT\r\n':
            return False
        self.sock.sendall(b'PROCEED\r\n')
        return True


def echo(connection, number=0, calls=1000):
    """Answer calls with the parameter that came."""
    for _ in range(calls):
        request = connection.take_message()
        connection.answer(
            {
                '$type': tentacle._RESPONSE_TYPE,
                'id': request['id'],
                'error': None,
                'result': (request['params'] or [None])[0],
            }
        )
        if not connection.proceed():
            return


def test_warm_connections_are_used_again(keys):
    with FakeTentacle(keys['agent'], echo) as fake:
        with tentacle.TentacleClient(fake.endpoint, keys['server']) as client:
            assert [client.call('s', 'm', str(i)) for i in range(5)] == list('01234')
        assert fake.connections == 1


@pytest.mark.parametrize('kill', ['closed', 'silent about NEXT'])
def test_a_dead_pooled_connection_is_replaced_unseen(keys, kill):
    def serve(connection, number):
        if number == 1:
            echo_once(connection)
            if kill == 'silent about NEXT':
                assert connection.take_line() == b'NEXT\r\n'
        else:
            echo(connection)

    def echo_once(connection):
        request = connection.take_message()
        connection.answer({'id': request['id'], 'error': None, 'result': request['params'][0]})

    with FakeTentacle(keys['agent'], serve) as fake:
        with tentacle.TentacleClient(fake.endpoint, keys['server']) as client:
            assert client.call('s', 'm', 'a') == 'a'
            assert client.call('s', 'm', 'b') == 'b'
        assert fake.connections == 2


def test_a_request_that_may_have_run_is_never_sent_twice(keys):
    requests = []

    def serve(connection, number):
        requests.append(connection.take_message()['method'])

    with FakeTentacle(keys['agent'], serve) as fake:
        with tentacle.TentacleClient(fake.endpoint, keys['server']) as client:
            with pytest.raises(tentacle.ConnectionLost, match='instead of answering'):
                client.call('s', 'm')
    assert requests == ['m']


def play_captured(name):
    """The original's side of a capture: its answers, about the ticket and request that came."""
    conversation = [(who, base64.b64decode(data)) for who, data in CAPTURES[name]]
    answers = {}
    for (_, sent), (_, expected) in zip(conversation[::2], conversation[1::2]):
        request = tentacle.decode_bson(inflated(sent))['Message']
        answers.setdefault(request['method'], []).append(
            (request, tentacle.decode_bson(inflated(expected))['Message'])
        )

    def serve(connection, number):
        while True:
            came = connection.take_message()
            candidates = answers[came['method']]
            want, answer = candidates.pop(0) if len(candidates) > 1 else candidates[0]
            assert same_shape(want, came) == []
            answer = dict(answer, id=came['id'])
            if answer['result'] and 'Ticket' in answer['result']:
                (parameter,) = came['params']
                answer['result'] = dict(
                    answer['result'], Ticket=parameter.get('ScriptTicket', parameter.get('Ticket'))
                )
            connection.sock.sendall(deflated(tentacle.encode_bson({'Message': wire_types(answer)})))
            if not connection.proceed():
                return

    return serve


def wire_types(answer):
    """64 bits again for what lost them in decoding."""
    if answer['result'] and 'NextLogSequence' in answer['result']:
        answer['result'] = dict(
            answer['result'], NextLogSequence=Int64(answer['result']['NextLogSequence'])
        )
    return answer


@pytest.mark.parametrize(
    'name, code, out, err',
    [
        (
            'listening-script-v2-exit7',
            7,
            'line one\nline two\nline three ✓ ünïcode\n',
            'to stderr\n',
        ),
        ('listening-script-v2-long', 0, 'begin\nend\n', ''),
    ],
)
def test_exec_drives_the_original(tmp_path, keys, name, code, out, err):
    home = tmp_path / 'home'
    with FakeTentacle(keys['agent'], play_captured(name)) as fake:
        target = '127.0.0.1:%d' % fake.port
        tentacle.Targets(str(home)).pin(target, fake.endpoint)
        cli('show-thumbprint', home=home)
        assert cli('exec', target, '--', 'echo x', home=home) == (code, out, err)


def test_a_tentacle_without_the_newer_service_is_driven_by_the_older(keys, tmp_path):
    lines = []
    with listening(tmp_path, keys['agent'], [keys['server'].thumbprint]) as agent:
        older = {'IScriptService': tentacle.ScriptService(agent._services.scripts)}
        agent._services.handle = tentacle.ServiceRegistry(older).handle
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            assert client.capabilities() == ['IScriptService', 'IFileTransferService']
            assert client.run_script('echo hi; exit 6', lines.append) == 6
    assert [line.text for line in lines if not line.remark] == ['hi']
    assert os.listdir(str(tmp_path / 'Work')) == []


def test_run_as_a_module(shared_agent, tmp_path, keys):
    home = str(tmp_path / 'home')
    tentacle.import_identity(keys['server'].path, os.path.join(home, 'tentacle.pem'))
    result = tentacle.run(
        '127.0.0.1:%d' % shared_agent.port,
        'echo hi; echo ho >&2; exit 9',
        thumbprint=shared_agent.identity.thumbprint.lower(),
        home=home,
    )
    assert (result.exit_code, result.stdout, result.stderr) == (9, 'hi\n', 'ho\n')


def test_an_exception_while_it_runs_cancels_the_script_there(client, shared_agent):
    work = os.path.join(shared_agent.home, 'Work')

    def fail(line):
        if line.text == 'started':
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.run_script('echo started; sleep 100', fail)
    assert os.listdir(work) == []


@pytest.fixture
def dispatcher(shared_agent, tmp_path, keys):
    """(home, target) of a dispatcher that knows the shared agent."""
    home = str(tmp_path / 'dispatcher')
    os.makedirs(home, 0o700)
    shutil.copy(keys['server'].path, os.path.join(home, 'tentacle.pem'))
    target = '127.0.0.1:%d' % shared_agent.port
    tentacle.Targets(home).pin(target, shared_agent.endpoint)
    return home, target


@pytest.mark.parametrize(
    'words, out',
    [
        (['echo one; echo two | cat'], 'one\ntwo\n'),
        (['echo', 'a  b', '$HOME', ';', "it's"], "a  b $HOME ; it's\n"),
    ],
)
def test_exec_of_a_command(dispatcher, words, out):
    home, target = dispatcher
    assert cli('exec', target, '--', *words, home=home) == (0, out, '')


def test_exec_of_a_file_and_of_standard_input(dispatcher, tmp_path):
    home, target = dispatcher
    (tmp_path / 'script').write_bytes('\ufeffecho ✓\r\nexit 3\r\n'.encode())
    assert cli('exec', target, '--script', str(tmp_path / 'script'), home=home) == (3, '✓\n', '')
    assert cli('exec', target, '--script', '-', home=home, stdin=b'echo in; exit 300') == (
        44,
        'in\n',
        '',
    )


def test_remarks_are_shown_on_request_alone(dispatcher):
    home, target = dispatcher
    code, out, err = cli('exec', target, '-v', '--', 'echo x', home=home)
    assert (code, out) == (0, 'x\n')
    assert 'Acquiring isolation mutex' in err and 'exited with code 0' in err


def test_output_comes_as_it_is_written(dispatcher, tmp_path):
    home, target = dispatcher
    gate = tmp_path / 'gate'
    process = subprocess.Popen(
        [
            sys.executable,
            PROGRAM,
            'exec',
            '--home',
            home,
            target,
            '--',
            'echo first; cat < %s' % shlex.quote(str(gate)),
        ],
        stdout=subprocess.PIPE,
    )
    os.mkfifo(str(gate))
    # The script may look for the gate before it is there: it then fails, and says nothing more.
    assert process.stdout.readline() == b'first\n'
    with contextlib.suppress(OSError):
        with open(os.open(str(gate), os.O_WRONLY | os.O_NONBLOCK), 'w') as file:
            file.write('second\n')
    rest = process.stdout.read()
    process.stdout.close()
    assert (process.wait(), rest) in [(0, b'second\n'), (1, b'')]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_cancels_the_script_there(dispatcher, shared_agent, number):
    home, target = dispatcher
    process = subprocess.Popen(
        [sys.executable, PROGRAM, 'exec', '--home', home, target, '--', 'echo $$; sleep 100'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pid = int(process.stdout.readline())
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b'Traceback' not in err
    assert not os.path.exists('/proc/%d' % pid)
    assert os.listdir(os.path.join(shared_agent.home, 'Work')) == []


def test_a_reader_that_leaves_cancels_the_script(dispatcher, shared_agent):
    home, target = dispatcher
    command = '%s %s exec --home %s %s -- "while :; do echo y; sleep 0.01; done" | head -1' % (
        sys.executable,
        PROGRAM,
        shlex.quote(home),
        target,
    )
    done = subprocess.run(
        ['bash', '-c', command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30
    )
    assert (done.stdout, done.stderr) == (b'y\n', b'')
    assert os.listdir(os.path.join(shared_agent.home, 'Work')) == []


def test_upload_and_download(dispatcher, shared_agent, tmp_path):
    home, target = dispatcher
    content = os.urandom(3 << 20)
    (tmp_path / 'in').write_bytes(content)
    place = '%s:%s' % (target, tmp_path / 'there' / 'a b')
    code, out, err = cli('upload', str(tmp_path / 'in'), place, target + ':second', home=home)
    assert (code, err) == (0, '')
    digest = hashlib.sha1(content).hexdigest()
    first, second = sorted(out.splitlines(), key=lambda line: 'second' in line)
    assert first.startswith('Uploaded to %s (3.1 MB, ' % place) and digest in first
    assert second.startswith('Uploaded to %s:%s/second' % (target, shared_agent.home))
    (tmp_path / 'out').write_bytes(b'old')
    os.chmod(str(tmp_path / 'out'), 0o640)
    code, out, err = cli('download', place, str(tmp_path / 'out'), home=home)
    assert (code, err) == (0, '') and out.startswith('Downloaded from %s (3.1 MB' % place)
    assert open_bytes(str(tmp_path / 'out')) == content
    assert stat.S_IMODE(os.stat(str(tmp_path / 'out')).st_mode) == 0o640
    assert cli('download', place, str(tmp_path), home=home)[0] == 0  # into a folder
    assert open_bytes(str(tmp_path / 'a b')) == content


def test_standard_input_and_output(dispatcher, tmp_path):
    home, target = dispatcher
    place = '%s:%s' % (target, tmp_path / 'there')
    assert cli('upload', '-', place, home=home, stdin=b'piped')[0] == 0
    code, out, err = cli('download', place, '-', home=home)
    assert (code, out) == (0, 'piped') and err.startswith('Downloaded')
    code, _, err = cli('download', place, '-', '--json', home=home)
    assert code == 2 and 'standard output' in err


def test_events_of_transfers(dispatcher, tmp_path):
    home, target = dispatcher
    (tmp_path / 'in').write_bytes(b'content')
    places = ['%s:%s' % (target, tmp_path / 'out'), '%s:/proc' % target]
    code, out, err = cli('upload', '--json', str(tmp_path / 'in'), *places, home=home)
    done, failed = sorted(map(json.loads, out.splitlines()), key=lambda event: event['event'])
    assert done.pop('seconds') >= 0
    assert done == {
        'event': 'done',
        'target': target,
        'path': str(tmp_path / 'out'),
        'full_path': str(tmp_path / 'out'),
        'bytes': 7,
        'sha1': hashlib.sha1(b'content').hexdigest(),
    }
    assert (failed['event'], failed['path']) == ('failed', '/proc') and 'directory' in err
    assert code == 1
    code, out, _ = cli('download', '--json', places[1], str(tmp_path / 'x'), home=home)
    assert code == 1 and json.loads(out)['event'] == 'failed'


def test_a_directory_goes_by_tar(dispatcher, tmp_path):
    home, target = dispatcher
    code, _, err = cli('upload', str(tmp_path), target + ':x', home=home)
    assert code == 2 and 'tar' in err and 'exec' in err
    code, _, err = cli('download', target + ':/proc', str(tmp_path / 'x'), home=home)
    assert code == 1 and 'tar' in err


@pytest.mark.parametrize(
    'place', ['host', 'host:', 'host:10933', ':/x', 'https://host', '/path', '']
)
def test_what_is_no_place_of_a_file(place):
    with pytest.raises(tentacle.UsageError, match='TARGET:PATH'):
        tentacle._remote_place(place)


@pytest.mark.parametrize(
    'text, place',
    [
        ('web-1:/x', ('web-1', '/x')),
        ('web-1:10934:/x:y', ('web-1:10934', '/x:y')),
        ('web-1:./10934', ('web-1', './10934')),
        ('web-1:C:\\x', ('web-1', 'C:\\x')),
        ('[::1]:10933:x', ('[::1]:10933', 'x')),
        ('[::1]:x', ('[::1]', 'x')),
        ('https://h:1/:/x', ('https://h:1/', '/x')),
        ('poll://abc/:x\ny', ('poll://abc/', 'x\ny')),
    ],
)
def test_places_of_files(text, place):
    assert tentacle._remote_place(text) == place


def test_a_failed_download_leaves_the_old_file(dispatcher, shared_agent, tmp_path):
    home, target = dispatcher
    (tmp_path / 'source').write_bytes(bytes(3 << 20))
    (tmp_path / 'mine').write_bytes(b'old')
    mine = str(tmp_path / 'mine')
    code, _, err = cli('download', target + ':/missing', mine, home=home)
    assert code == 1 and 'There is no file /missing on ' + target in err
    with Forwarder(shared_agent.port, lambda number: [('cut', False, 2 << 20)]) as between:
        through = '127.0.0.1:%d' % between.port
        endpoint = shared_agent.endpoint._replace(uri='https://%s/' % through)
        tentacle.Targets(home).pin(through, endpoint)
        code, _, err = cli('download', '%s:%s' % (through, tmp_path / 'source'), mine, home=home)
    assert code == 1 and 'closed the connection' in err or 'broke' in err
    assert open_bytes(mine) == b'old'
    assert sorted(os.listdir(str(tmp_path))) == ['dispatcher', 'mine', 'source']


@pytest.mark.parametrize('to_server', [True, False])
def test_ctrl_c_leaves_no_half_file(dispatcher, shared_agent, tmp_path, to_server):
    home, target = dispatcher
    here, there = tmp_path / 'here', tmp_path / 'there'
    for folder in (here, there):
        folder.mkdir()
    source = (here if to_server else there) / 'source'
    source.write_bytes(bytes(3 << 20))
    with Forwarder(shared_agent.port, lambda number: [('swallow', to_server, 2 << 20)]) as between:
        through = '127.0.0.1:%d' % between.port
        endpoint = shared_agent.endpoint._replace(uri='https://%s/' % through)
        tentacle.Targets(home).pin(through, endpoint)
        words = ['upload', str(source), '%s:%s' % (through, there / 'copy')]
        if not to_server:
            words = ['download', '%s:%s' % (through, source), str(here / 'copy')]
        process = subprocess.Popen(
            [sys.executable, PROGRAM, words[0], '--home', home] + words[1:],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        eventually(lambda: temporary_files(there if to_server else here))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b'', b'')
    eventually(lambda: sorted(os.listdir(str(here)) + os.listdir(str(there))) == ['source'])


def on_terminal(command, columns=80, **environment):
    """(exit code, what a terminal shows) of a command that has one."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=dict(os.environ, **environment)
    )
    os.close(slave)
    shown = b''
    with contextlib.suppress(OSError):  # EIO: the last one has closed it
        while True:
            part = os.read(master, 65536)
            if not part:
                break
            shown += part
    os.close(master)
    return process.wait(20), shown.decode()


@pytest.mark.parametrize('columns', [80, 40])
def test_a_bar_on_a_terminal(dispatcher, shared_agent, tmp_path, columns):
    home, _ = dispatcher
    (tmp_path / 'source').write_bytes(bytes(3 << 20))
    # The bar shows itself when there is time for it.
    with Forwarder(shared_agent.port, lambda number: [('delay', False, 2 << 20)]) as between:
        through = '127.0.0.1:%d' % between.port
        endpoint = shared_agent.endpoint._replace(uri='https://%s/' % through)
        tentacle.Targets(home).pin(through, endpoint)
        place = '%s:%s' % (through, tmp_path / 'source')
        command = [sys.executable, PROGRAM, 'download', '--home', home, place, os.devnull]
        code, shown = on_terminal(command, columns, COLUMNS='')
    assert code == 0
    bars = re.findall(r'[^\r\n]* MB of 3.1 MB  [\d.]+ .B/s  \d+:\d\d left', shown)
    assert bars and all(len(bar) < columns for bar in bars)
    assert shown.rstrip().splitlines()[-1].rpartition('\r')[2].startswith('Downloaded from')


def test_files_of_a_script(dispatcher, tmp_path):
    home, target = dispatcher
    (tmp_path / 'a b.txt').write_bytes(b'first ')
    (tmp_path / 'big').write_bytes(bytes(300000))
    words = ['--file', str(tmp_path / 'a b.txt'), '--file', str(tmp_path / 'big')]
    script = 'cat "a b.txt"; wc -c < big'
    assert cli('exec', target, *words, '--', script, home=home) == (0, 'first 300000\n', '')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'big').write_bytes(b'')
    code, _, err = cli(
        'exec', target, *words, '--file', str(tmp_path / 'other' / 'big'), '--', 'x', home=home
    )
    assert code == 2 and 'two of the files are named big' in err
    code, _, err = cli('exec', target, '--file', '/missing', '--', 'x', home=home)
    assert code == 2 and '/missing can not be read' in err


def test_a_file_that_was_damaged_is_told_of(keys):
    def serve(connection, number):
        request = connection.take_message()
        length = request['params'][1]['length']
        connection.take(24 + length + 8)
        result = {'FullPath': '/x', 'Hash': '0' * 40, 'Length': Int64(length)}
        kind = tentacle.UploadResult.wire_type
        connection.answer(
            {'id': request['id'], 'error': None, 'result': dict({'$type': kind}, **result)}
        )

    with FakeTentacle(keys['agent'], serve) as fake:
        with tentacle.TentacleClient(fake.endpoint, keys['server']) as client:
            with pytest.raises(tentacle.TentacleError, match='damaged on its way'):
                client.upload(io.BytesIO(b'content'), '/x')


# -- many targets at once


def test_waves_and_failures():
    at_once, most, begun = set(), [0], []
    lock = threading.Lock()

    def run_on(target):
        with lock:
            begun.append(target)
            at_once.add(target)
            most[0] = max(most[0], len(at_once))
        threading.Event().wait(0.01)
        with lock:
            at_once.remove(target)
        return int(target in ('t3', 't4'))

    names = ['t%d' % number for number in range(10)]
    results = list(tentacle.FanOut(run_on, parallel=4).results(names))
    assert sorted(result.target for result in results) == names and most[0] == 4
    most[0] = 0
    results = list(tentacle.FanOut(run_on, rolling=2).results(names))
    assert most[0] <= 2 and len(results) == 10
    for number in range(0, 10, 2):
        assert {result.target for result in results[number : number + 2]} == set(
            names[number : number + 2]
        )
    del begun[:]
    results = list(tentacle.FanOut(run_on, rolling=2, max_fail=1).results(names))
    states = {result.target: result.state for result in results}
    assert sorted(begun) == names[:6]  # the second failure comes in the third wave
    assert [states[name] for name in names[3:7]] == ['failed', 'failed', 'ok', 'skipped']


def test_a_hundred_targets_of_which_some_are_ill(shared_agent, tmp_path, keys):
    """One slow or dead host delays nobody, and each is told of by itself."""
    home = tmp_path / 'home'
    dispatcher = tentacle.Dispatcher(str(home), LIMITS._replace(handshake=5, cancelled_script=3))
    cli('configure', '--trust', dispatcher.identity.thumbprint, home=shared_agent.home)
    silent, dropping = [socket.create_server(('127.0.0.1', 0)) for _ in range(2)]

    def drop():
        with contextlib.suppress(OSError):
            while True:
                dropping.accept()[0].close()

    dropper = threading.Thread(target=drop)
    dropper.start()
    with socket.create_server(('127.0.0.1', 0)) as server:
        refusing = server.getsockname()[1]
    kinds = {'good': shared_agent.port, 'wrong': shared_agent.port, 'refusing': refusing}
    kinds.update(silent=silent.getsockname()[1], dropping=dropping.getsockname()[1])
    lines = []
    for number in range(100):
        kind = list(kinds)[1 + number % 4] if number % 5 == 0 else 'good'
        thumbprint = '0' * 40 if kind == 'wrong' else shared_agent.identity.thumbprint
        lines.append('[%s-%d]' % (kind, number))
        lines.append('uri = https://127.0.0.1:%d/' % kinds[kind])
        lines.append('thumbprint = %s\ngroups = all' % thumbprint)
    (home / 'targets').write_text('\n'.join(lines) + '\n')
    output = []
    take = lambda target, line: line.remark or output.append((target, line.text))
    results = list(dispatcher.run(['@all'], 'echo hi', on_line=take))
    dropping.shutdown(socket.SHUT_RDWR)
    for sock in (silent, dropping):
        sock.close()
    dropper.join()
    assert len(results) == 100
    for result in results:
        kind = result.target.partition('-')[0]
        assert result.state == ('ok' if kind == 'good' else 'unreachable')
        words = {'wrong': 'IDENTITY', 'refusing': 'refuses', 'silent': 'handshake'}
        assert words.get(kind, '') in result.error
    good = [result.target for result in results if result.state == 'ok']
    assert sorted(output) == sorted((target, 'hi') for target in good) and len(good) == 80
    assert results[-1].target.startswith('silent')  # it takes its time for a handshake


# -- jobs that are kept


@pytest.fixture
def store(tmp_path):
    store = tentacle.JobStore(str(tmp_path))
    yield store
    store.close()


def test_jobs_and_their_lines(store, tmp_path):
    first = store.add_all([('one', ONE)], 'echo hi')[0]
    second = store.add_all([('two', ONE._replace(thumbprint='0' * 40))], 'echo', 1234, True)[0]
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600
    job = store.job(second)
    assert (job.target, job.uri, job.thumbprint, job.script) == ('two', ONE.uri, '0' * 40, 'echo')
    assert (job.state, job.expires, job.retry_lost, job.next_log) == ('waiting', 1234, 1, 0)
    entries = [tentacle.LogEntry(0, 5, 'a'), tentacle.LogEntry(1, 6, 'b')]
    job = store.change(store.job(first), entries, state='running', next_log=2)
    job = store.change(job, entries[:1], state='finished', next_log=3, ended=1)
    reader = tentacle.JobStore(str(tmp_path), read_only=True)
    assert [line for _, line in reader.lines(first)] == entries + entries[:1]
    assert [number for number, _ in reader.lines(first, after=1)] == [1, 2]
    assert [job.number for job in reader.jobs(everything=False)] == [second]
    with pytest.raises(tentacle.UsageError, match='no job 9'):
        reader.job(9)
    with pytest.raises(tentacle.TentacleError, match='readonly'):
        reader.add_all([('x', ONE)], 'x')
    reader.close()
    store.prune(3600, 100)
    assert [job.number for job in store.jobs()] == [second]
    assert store.lines(first) == []


def test_old_jobs_are_pruned_by_count(store):
    now = int(time.time() * 1000)
    for number in range(10):
        job = store.job(store.add_all([('one', ONE)], 'x')[0])
        if number:
            store.change(job, state='finished', ended=now)
    store.prune(3600, 3)
    assert [job.number for job in store.jobs()] == [1, 8, 9, 10]  # the first is not over


def test_databases_that_can_not_be_used(tmp_path):
    home = str(tmp_path)
    tentacle.JobStore(home).close()
    database = sqlite3.connect(os.path.join(home, 'jobs.db'))
    database.execute('PRAGMA user_version = 99')
    database.close()
    with pytest.raises(tentacle.TentacleError, match='newer tentacle.py'):
        tentacle.JobStore(home)
    with open(os.path.join(home, 'jobs.db'), 'wb') as file:
        file.write(b'nonsense' * 1000)
    with pytest.raises(tentacle.TentacleError, match='jobs.db can not be used'):
        tentacle.JobStore(home)


def test_a_database_of_the_first_version(tmp_path):
    database = sqlite3.connect(str(tmp_path / 'jobs.db'))
    database.executescript(tentacle._JOB_MIGRATIONS[0])
    database.execute(
        "INSERT INTO jobs VALUES (7, 'one', 'poll://one/', NULL, 'echo', 'ticket', '', 'waiting',"
        " NULL, '', 1, NULL, NULL, NULL, 0, 0, 0, 0)"
    )
    database.commit()
    database.close()
    store = tentacle.JobStore(str(tmp_path))
    assert (store.job(7).script, store.job(7).characters) == ('echo', 0)
    store.close()


def without_power_over_files():
    """For root: let the modes of files count, as for everyone else."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='capabilities are of Linux')
def test_a_database_that_may_not_be_written(tmp_path):
    home = str(tmp_path / 'home')
    cli('show-thumbprint', home=home)
    tentacle.JobStore(home).close()
    before = pathlib.Path(home, 'jobs.db').read_bytes()
    os.chmod(os.path.join(home, 'jobs.db'), 0o400)
    done = subprocess.run(
        [sys.executable, PROGRAM, 'serve', '--port', '0', '--home', home],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=without_power_over_files,
        timeout=20,
    )
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and 'jobs.db can not be used' in line and 'may write' in line
    assert pathlib.Path(home, 'jobs.db').read_bytes() == before
    code, out, _ = cli('jobs', home=home)
    assert (code, out) == (0, 'JOB  TARGET  STATE  CODE  AGE  SCRIPT  NOTE\n')


@pytest.mark.parametrize('limits', [{'job_lines': 10}, {'job_characters': 10}])
def test_the_output_of_a_job_is_bounded(tmp_path, limits):
    entries = [tentacle.LogEntry(0, 5, 'x') for _ in range(25)]
    answers = iter(
        [
            status_of(tentacle.RUNNING, 0, entries[:6], 6),
            status_of(tentacle.RUNNING, 0, entries[6:20], 20),
            status_of(tentacle.COMPLETE, 0, entries[20:], 25),
        ]
    )
    clients = {'host': FakeScripts(lambda method, command: next(answers))}
    with faked_jobs(tmp_path, clients, **limits) as (runner, store):
        number = runner.add('host', HOST, 'x')
        assert over(store, number).state == 'finished'
        texts = [entry.text for _, entry in store.lines(number)]
    assert texts[:10] == ['x'] * 10 and len(texts) == 11 and 'is not kept' in texts[10]


def test_a_full_disk_loses_no_job(store):
    """What can not be written is refused, and what stood there still does."""
    (number,) = store.add_all([('one', ONE)], 'x')
    (pages,) = store._database.execute('PRAGMA page_count').fetchone()
    store._database.execute('PRAGMA max_page_count = %d' % pages)
    with pytest.raises(tentacle.TentacleError, match='full'):
        store.change(store.job(number), [tentacle.LogEntry(0, 0, 'x' * 100000)], state='running')
    assert (store.job(number).state, store.lines(number)) == ('waiting', [])


@contextlib.contextmanager
def running_jobs(tmp_path, server, **limits):
    store = tentacle.JobStore(str(tmp_path))
    client_of = lambda target, endpoint: server.client(endpoint)
    runner = tentacle.JobRunner(
        store, client_of, server.is_connected, limits=LIMITS._replace(**limits)
    )
    server.on_admitted = runner.look
    runner.start()
    try:
        yield runner, store
    finally:
        runner.stop()
        runner.join()
        store.close()


def own_lines(store, number):
    """(source, text) of what a job's script wrote."""
    remarks = tentacle.RemarkFilter()
    lines = [remarks.line(entry) for _, entry in store.lines(number)]
    return [(line.source, line.text) for line in lines if not line.remark]


def over(store, number, seconds=10):
    """A job when it is over."""

    def ask():
        job = store.job(number)
        return job if job.is_over else None

    return eventually(ask, seconds)


def test_a_job_waits_for_its_tentacle(tmp_path, keys):
    with polled(tmp_path, keys) as server, running_jobs(tmp_path, server) as (runner, store):
        number = runner.add('one', ONE, 'echo out; echo err >&2; exit 3')
        soon = runner.add('one', ONE, 'true', expires=int(time.time() * 1000) + 300)
        withdrawn = runner.add('one', ONE, 'true')
        runner.cancel(withdrawn)
        assert over(store, soon).state == 'expired'
        assert over(store, withdrawn).state == 'cancelled'
        assert store.job(number).state == 'waiting'
        with polling(tmp_path, keys, server.port):
            job, lines = over(store, number), own_lines(store, number)
            long = runner.add('one', ONE, 'echo on; sleep 100')
            eventually(lambda: own_lines(store, long))
            runner.cancel(long)
            assert over(store, long)[7:9] == ('cancelled', tentacle.CANCELED_EXIT_CODE)
            eventually(lambda: os.listdir(str(tmp_path / 'agent' / 'Work')) == [])
    assert (job.state, job.exit_code) == ('finished', 3)
    assert sorted(lines) == [(0, 'out'), (1, 'err')]


class FakeScripts:
    """Stands in for a client: `answer` makes of (method, command) a status, or raises. An `old`
    tentacle has the first script service alone.
    """

    def __init__(self, answer, old=False):
        self.call_for = lambda cls, service, method, command: answer(method, command)
        self.call = lambda service, method, command: None
        self.capabilities = lambda: [] if old else ['IScriptServiceV2']


def status_of(state, code=0, lines=(), following=0):
    return tentacle.ScriptStatusResponseV2(
        state=state, exit_code=code, logs=list(lines), next_log_sequence=following
    )


DONE = status_of(tentacle.COMPLETE, 0)
HOST = tentacle.ServiceEndPoint('https://host:1/', '0' * 40)


@contextlib.contextmanager
def faked_jobs(tmp_path, clients, there=lambda uri: False, **limits):
    store = tentacle.JobStore(str(tmp_path))
    runner = tentacle.JobRunner(
        store, lambda name, endpoint: clients[name], there, limits=LIMITS._replace(**limits)
    )
    runner.start()
    try:
        yield runner, store
    finally:
        runner.stop()
        runner.join()
        store.close()


def test_an_expiry_in_a_far_future_stops_nobody(tmp_path):
    clients = {'host': FakeScripts(lambda method, command: DONE)}
    with faked_jobs(tmp_path, clients) as (runner, store):
        for _ in range(40):
            runner.add('away', ONE, 'x', 10**17)
        assert over(store, runner.add('host', HOST, 'x')).state == 'finished'


def test_a_job_that_runs_expires_no_more(tmp_path, monkeypatch):
    """It waits for its tentacle, and does not spin."""
    there = [True]
    steps = []
    step = tentacle.JobRunner._step
    monkeypatch.setattr(
        tentacle.JobRunner, '_step', lambda self, job: (steps.append(job.state), step(self, job))[1]
    )
    clients = {'one': FakeScripts(lambda method, command: status_of(tentacle.RUNNING))}
    with faked_jobs(tmp_path, clients, lambda uri: there[0]) as (runner, store):
        number = runner.add('one', ONE, 'x', int(time.time() * 1000) + 200)
        eventually(lambda: store.job(number).state == 'running')
        there[0] = False
        eventually(lambda: number in runner._absent.get(ONE.uri, ()))
        threading.Event().wait(0.4)
        assert len(steps) < 20 and store.job(number).state == 'running'


def test_a_start_that_did_not_leave_is_none(tmp_path):
    def refuse(method, command):
        raise tentacle.NotDelivered('refused')

    with faked_jobs(tmp_path, {'host': FakeScripts(refuse)}) as (runner, store):
        number = runner.add('host', HOST, 'x')
        eventually(lambda: store.job(number).error)
        assert (store.job(number).state, store.job(number).started) == ('waiting', None)
        runner.cancel(number)
        assert over(store, number).state == 'cancelled'


def test_a_slow_tentacle_delays_no_other(tmp_path):
    ended = threading.Event()

    def wait(method, command):
        ended.wait(20)
        return DONE

    clients = {'slow': FakeScripts(wait), 'host': FakeScripts(lambda method, command: DONE)}
    with faked_jobs(tmp_path, clients) as (runner, store):
        slow = [runner.add('slow', HOST._replace(uri='https://slow:1/'), 'x') for _ in range(50)]
        assert over(store, runner.add('host', HOST, 'x')).state == 'finished'
        ended.set()
        for number in slow:
            assert over(store, number).state == 'finished'


def test_a_tentacle_that_loses_all_is_not_stormed(tmp_path):
    asked = []

    def lose(method, command):
        asked.append(method)
        return status_of(tentacle.COMPLETE, tentacle.UNKNOWN_TICKET_EXIT_CODE)

    with faked_jobs(tmp_path, {'host': FakeScripts(lose)}) as (runner, store):
        number = runner.add('host', HOST, 'x', None, True)
        eventually(lambda: asked)
        threading.Event().wait(0.5)
        assert len(asked) == 1 and len(store.lines(number)) == 1


def test_dead_hosts_hold_up_no_job(tmp_path):
    """More of them than there are threads for all others."""
    ended = threading.Event()

    def wait(method, command):
        ended.wait(30)
        raise tentacle.NotDelivered('dead')

    clients = {'dead': FakeScripts(wait), 'host': FakeScripts(lambda method, command: DONE)}
    with faked_jobs(tmp_path, clients) as (runner, store):
        for number in range(40):
            runner.add('dead', HOST._replace(uri='https://dead-%d:1/' % number), 'x')
        assert over(store, runner.add('host', HOST, 'x')).state == 'finished'
        ended.set()
        eventually(lambda: len(runner._threads) <= runner._THREADS)


def test_a_long_log_is_taken_without_pauses(tmp_path, monkeypatch):
    """Also that part of it which is not kept."""
    entries = [tentacle.LogEntry(0, 5, 'x')] * 10
    answers = [status_of(tentacle.RUNNING, 0, entries, 10 * i + 10) for i in range(50)]
    answers = iter(answers + [status_of(tentacle.COMPLETE, 0, [], 500)])
    clients = {'host': FakeScripts(lambda method, command: next(answers))}
    monkeypatch.setattr(tentacle.JobRunner, '_PAUSES', (0.0, 1000.0))
    with faked_jobs(tmp_path, clients, job_lines=5) as (runner, store):
        assert over(store, runner.add('host', HOST, 'x')).state == 'finished'


@pytest.mark.parametrize('retry', [False, True])
def test_a_job_that_its_tentacle_lost(tmp_path, keys, retry):
    go = tmp_path / 'go'
    body = 'echo on; [ -e %s ] && exit 4; sleep 100' % shlex.quote(str(go))
    with polled(tmp_path, keys) as server, running_jobs(tmp_path, server) as (runner, store):
        number = runner.add('one', ONE, body, retry_lost=retry)
        with polling(tmp_path, keys, server.port) as agent:
            eventually(lambda: own_lines(store, number))
            go.touch()
            # As when the host was made anew.
            ticket = store.job(number).ticket
            with server.client(ONE) as client:
                cancel = about(tentacle.CancelScriptCommandV2, ticket)
                v2(client, 'CancelScript', cancel)
                finished(client, ticket)
                v2(client, 'CompleteScript', about(tentacle.CompleteScriptCommandV2, ticket))
            job = over(store, number)
            assert agent.subscription
        texts = [text for _, text in own_lines(store, number)]
    if job.state != 'cancelled':  # we may have asked between its end and its loss
        assert (job.state, job.exit_code) == (('finished', 4) if retry else ('lost', None))
        assert texts.count('on') == 1 + retry


def test_jobs_outlive_a_serve_that_is_killed(tmp_path, keys):
    """200 jobs, and 50 kills at random moments: each runs once, and its whole log is here."""
    chance = random.Random(8)
    home, marks = str(tmp_path / 'server'), tmp_path / 'marks'
    marks.mkdir()
    program, environment = installed(str(tmp_path))
    thumbprint = cli('show-thumbprint', home=home)[1].strip()
    cli('trust', 'poll://one/', keys['agent'].thumbprint, home=home)
    identity = tentacle.load_identity(os.path.join(home, 'tentacle.pem'))
    with socket.create_server(('127.0.0.1', 0)) as place:
        port = place.getsockname()[1]
    command = [sys.executable, program, 'serve', '--home', home, '--port', str(port)]
    path = os.path.join(home, 'serve.sock')

    def started():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert process.stdout.readline().startswith(b'Server')
        return process

    def add(count):
        added = []
        with tentacle.RelayedClient(path, ONE, identity) as client:
            for _ in range(count):
                mark = shlex.quote(str(marks / str(len(numbers) + len(added))))
                body = 'echo x >> %s; echo 1; sleep 0.%d; echo 2; exit 5' % (
                    mark,
                    chance.randrange(3),
                )
                facts = [['one', 'poll://one/', keys['agent'].thumbprint]], body, None, False
                added += client.call('TentaclePy', 'AddJobs', *facts)
        return added

    numbers = []
    trusted = frozenset([thumbprint])
    agent = tentacle.PollingTentacle(
        str(tmp_path / 'agent'),
        keys['agent'],
        lambda: trusted,
        ['https://127.0.0.1:%d/' % port],
        'poll://one/',
        connections=5,
        limits=LIMITS._replace(least_back_off=0.05, most_back_off=0.1),
    )
    agent.start()
    for kill in range(50):
        process = started()
        numbers += add(4)
        threading.Event().wait(chance.random() * 0.4)
        process.kill()
        process.wait()
        process.stdout.close()
    process = started()
    store = tentacle.JobStore(home, read_only=True)
    assert len(store.jobs()) == len(numbers) == 200
    for number in numbers:
        job = over(store, number, 60)
        assert (job.state, job.exit_code) == ('finished', 5)
        assert own_lines(store, number) == [(0, '1'), (0, '2')]
    store.close()
    for mark in range(200):
        assert (marks / str(mark)).read_text() == 'x\n'
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    agent.stop()


# -- proposals of the mutation round


def test_a_job_of_the_older_service_is_begun_once(tmp_path):
    """After a kill nobody knows whether it was; and the ticket of one that was is kept."""
    asked = []

    def answer(method, command):
        asked.append(method)
        if method == 'StartScript':
            return tentacle.ScriptTicket(task_id='theirs')
        assert command.ticket.task_id == 'theirs'
        if asked.count('GetStatus') == 1:
            raise tentacle.ConnectionLost('cut')
        return DONE

    client = FakeScripts(answer, old=True)
    store = tentacle.JobStore(str(tmp_path))
    (number,) = store.add_all([('host', HOST)], 'x')
    store.change(store.job(number), state='sent', service='V1')
    store.close()
    with faked_jobs(tmp_path, {'host': client}) as (runner, store):
        assert over(store, number).state == 'lost' and not asked
        assert over(store, runner.add('host', HOST, 'x')).state == 'finished'
    assert asked.count('StartScript') == 1


def test_a_start_whose_answer_is_lost(tmp_path):
    asked = []

    def answer(method, command):
        asked.append(method)
        raise tentacle.ConnectionLost('cut')

    client = FakeScripts(answer, old=True)
    with faked_jobs(tmp_path, {'host': client}) as (runner, store):
        job = over(store, runner.add('host', HOST, 'x'))
    assert (job.state, job.error) == ('lost', 'whether it was started is not known')
    assert asked == ['StartScript']


def test_jobs_that_are_cancelled_late(tmp_path):
    """One that is over stays so; one that is lost meanwhile is not begun anew; a second time gives
    up one whose tentacle has left.
    """
    there, asked = [True], []

    def answer(method, command):
        asked.append(method)
        if method == 'CancelScript':
            return status_of(tentacle.COMPLETE, tentacle.UNKNOWN_TICKET_EXIT_CODE)
        return DONE if command.ticket.task_id in done else status_of(tentacle.RUNNING)

    done = set()
    clients = {'one': FakeScripts(answer)}
    with faked_jobs(tmp_path, clients, lambda uri: there[0]) as (runner, store):
        running = lambda number: lambda: store.job(number).state == 'running'
        number = runner.add('one', ONE, 'x', None, True)
        eventually(running(number))
        runner.cancel(number)
        assert over(store, number).state == 'lost' and len(store.lines(number)) == 0
        first = runner.add('one', ONE, 'x')
        done.add(store.job(first).ticket)
        assert over(store, first).state == 'finished'
        assert [runner.cancel(first).state for _ in range(2)] == ['finished'] * 2
        number = runner.add('one', ONE, 'x')
        eventually(running(number))
        there[0] = False
        eventually(lambda: number in runner._absent.get(ONE.uri, ()))
        assert runner.cancel(number).state == 'running'
        eventually(lambda: number not in runner._planned and number not in runner._at_work)
        assert runner.cancel(number).state == 'lost'


def test_old_jobs_go_while_it_runs(tmp_path):
    clients = {'host': FakeScripts(lambda method, command: DONE)}
    with faked_jobs(tmp_path, clients) as (runner, store):
        runner._keep = 3600.0, 5
        runner.add_all([('host', HOST)] * 100, 'x')
        eventually(lambda: len(store.jobs()) == 5)


def test_so_many_jobs_are_kept(tmp_path):
    store = tentacle.JobStore(str(tmp_path))
    for number in store.add_all([('one', ONE)] * 3, 'x'):
        store.change(store.job(number), state='finished', ended=int(time.time() * 1000))
    store.close()
    cli('configure', '--job-count', '1', home=tmp_path)
    with serving(tmp_path):
        store = tentacle.JobStore(str(tmp_path), read_only=True)
        eventually(lambda: [job.number for job in store.jobs()] == [3])
        store.close()


def test_a_job_that_is_refused_has_failed(tmp_path):
    def refuse(method, command):
        raise tentacle.ServiceError('no such method')

    with faked_jobs(tmp_path, {'host': FakeScripts(refuse)}) as (runner, store):
        job = over(store, runner.add('host', HOST, 'x'))
        assert (job.state, job.error) == ('failed', 'no such method')


def test_a_job_whose_tentacle_leaves_at_its_end_is_finished(tmp_path):
    there = [True]

    def end(method, command):
        there[0] = False
        return status_of(tentacle.COMPLETE, 3)

    clients = {'one': FakeScripts(end)}
    with faked_jobs(tmp_path, clients, lambda uri: there[0]) as (runner, store):
        job = over(store, runner.add('one', ONE, 'x'))
        assert (job.state, job.exit_code) == ('finished', 3)


def test_after_a_restart_a_slow_tentacle_delays_no_other(tmp_path):
    store = tentacle.JobStore(str(tmp_path))
    slow = HOST._replace(uri='https://slow:1/')
    numbers = store.add_all([('slow', slow)] * 50 + [('host', HOST)], 'x')
    store.close()
    ended = threading.Event()
    wait = lambda method, command: (ended.wait(20), DONE)[1]
    clients = {'slow': FakeScripts(wait), 'host': FakeScripts(lambda method, command: DONE)}
    with faked_jobs(tmp_path, clients) as (runner, store):
        assert over(store, numbers[-1]).state == 'finished'
        ended.set()


def test_jobs_are_on_the_disk(tmp_path):
    """Ahead of a number that somebody gets, and of a start that may not be tried twice."""
    written = []

    def start(method, command):
        written.append(method)
        raise tentacle.ServiceError('no')

    client = FakeScripts(start, old=True)
    with faked_jobs(tmp_path, {'host': client}) as (runner, store):
        store._database.set_trace_callback(written.append)
        number = runner.add('host', HOST, 'x')
        assert over(store, number).state == 'failed'
        store._database.set_trace_callback(None)
    full = 'PRAGMA synchronous = FULL'
    text = '\n'.join(written)
    for action in ('INSERT INTO jobs', "UPDATE jobs SET state = 'sent'"):
        assert full in text[: text.index(action)].split('PRAGMA synchronous = NORMAL')[-1]


@pytest.mark.parametrize(
    'text, seconds', [('90s', 90), ('30m', 1800), ('2h', 7200), ('7d', 604800)]
)
def test_durations(text, seconds):
    assert tentacle._duration(text) == seconds


def test_states_of_targets():
    outcomes = {
        'cut': tentacle.ConnectionLost('cut'),
        'refused': tentacle.NotDelivered('refused'),
        'stopped': tentacle.Cancelled('stopped'),
        'bug': ValueError('bug'),
    }

    def run_on(target):
        raise outcomes[target]

    results = tentacle.FanOut(run_on).results(list(outcomes))
    states = {result.target: result.state for result in results}
    assert states == {
        'cut': 'lost',
        'refused': 'unreachable',
        'stopped': 'cancelled',
        'bug': 'lost',
    }


def test_nothing_is_begun_once_it_is_stopped():
    begun = []

    def run_on(target):
        begun.append(target)
        fan_out.stop.set()
        return 0

    fan_out = tentacle.FanOut(run_on, parallel=1)
    results = list(fan_out.results(['a', 'b', 'c']))
    assert begun == ['a'] and [result.state for result in results] == ['ok'] + ['cancelled'] * 2


def test_who_leaves_the_results_has_the_rest_cancelled():
    def run_on(target):
        return 0 if target == 'a' else int(not fan_out.stop.wait(10))

    fan_out = tentacle.FanOut(run_on)
    results = fan_out.results(['a', 'b'])
    assert next(results).target == 'a'
    results.close()
    assert fan_out.stop.is_set()


def test_one_that_does_not_answer_holds_nobody_up():
    ended = threading.Event()
    limits = LIMITS._replace(cancelled_script=0.1)

    def run_on(target):
        fan_out.begins(target)
        return int(ended.wait(10))

    fan_out = tentacle.FanOut(run_on, limits=limits)
    timer = threading.Timer(0.2, fan_out.stop.set)
    timer.start()
    (result,) = fan_out.results(['dead'])
    assert result.state == 'cancelled' and 'may go on' in result.error
    ended.set()
    timer.join()


def test_a_target_without_a_proxy(tmp_path, monkeypatch):
    (tmp_path / 'targets').write_text('[web-1]\nthumbprint = %s\nproxy = none\n' % ('0' * 40))
    monkeypatch.setenv('HTTPS_PROXY', 'http://general:1')
    targets = tentacle.Targets(str(tmp_path))
    assert targets.to_call('web-1', targets.find('web-1')).proxy is None


def test_a_known_subscription_is_for_its_thumbprint_alone(tmp_path):
    targets = tentacle.Targets(str(tmp_path))
    targets.pin('one', ONE._replace(thumbprint='A' * 40))
    trusted = tentacle.TrustedPollers(str(tmp_path), ['B' * 40])
    assert trusted() == {'A' * 40, 'B' * 40}
    assert [trusted.pinned(uri) for uri in (ONE.uri, 'poll://two/')] == ['A' * 40, None]


def test_a_call_of_one_that_left_is_withdrawn(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        relay = tentacle.Relay(str(tmp_path / 'sock'), server)
        relay.start()
        path = str(tmp_path / 'sock')
        client = tentacle.RelayedClient(path, ONE, keys['server'])
        thread = threading.Thread(target=lambda: suppressed_call(client))
        thread.start()
        eventually(lambda: server._subscriptions)
        for stream in list(relay._streams):
            stream.hang_up()
        eventually(lambda: not server._subscriptions, 3)
        thread.join()
        relay.stop()


def suppressed_call(client):
    with contextlib.suppress(tentacle.TentacleError):
        client.call('IScriptServiceV2', 'Nothing')


def test_a_call_over_the_relay_that_nobody_fetches(tmp_path, keys):
    with polled(tmp_path, keys) as server:
        relay = tentacle.Relay(str(tmp_path / 'sock'), server)
        relay.start()
        endpoint = ONE._replace(queue_timeout=0.1)
        with tentacle.RelayedClient(str(tmp_path / 'sock'), endpoint, keys['server']) as client:
            with pytest.raises(tentacle.NotDelivered, match='has not polled'):
                client.call('IScriptServiceV2', 'Nothing')
        assert not server._subscriptions
        relay.stop()


def test_nobody_but_a_person_is_told(monkeypatch, capsys):
    monkeypatch.setattr(tentacle._Patience, '_SECONDS', 0.01)
    patience = tentacle._Patience(None, {'web-1': HOST})
    threading.Event().wait(0.1)
    patience.end()
    assert capsys.readouterr().err == ''


# ---- 18. Configuration ---------------------------------------------------------------------------

ORIGINALS_SETTINGS = '''\ufeff<?xml version="1.0" encoding="utf-8"?>
<octopus-settings xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
 xmlns:xsd="http://www.w3.org/2001/XMLSchema">
  <set key="Octopus.Home">/srv/tentacle-a/home</set>
  <set key="Octopus.Server.Proxy.ProxyHost">proxy.example</set>
  <set key="Someone.Else">a &lt;b&gt; &amp; "c" ✓</set>
  <set key="Tentacle.CertificateThumbprint">6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3</set>
  <set key="Tentacle.Communication.TrustedOctopusServers">[{
"Thumbprint":"6B674AA1DA6D1D7D7AA4D3241534DC01448A6E74",
"CommunicationStyle":1,"Address":null,"Squid":null,"SubscriptionId":null}]</set>
  <set key="Tentacle.Deployment.ApplicationDirectory">/srv/tentacle-a/app</set>
  <set key="Tentacle.Services.NoListen">false</set>
  <set key="Tentacle.Services.PortNumber">10934</set>
</octopus-settings>'''


def settings_file(home, text):
    path = os.path.join(str(home), 'tentacle-default.config')
    os.makedirs(str(home), exist_ok=True)
    with open(path, 'wb') as file:
        file.write(text.encode())
    return path


def test_settings_of_the_original_are_read(tmp_path):
    settings = tentacle.read_settings(settings_file(tmp_path, ORIGINALS_SETTINGS))
    assert settings.home == '/srv/tentacle-a/home'
    assert settings.port == 10934
    assert settings.trusted == ('6B674AA1DA6D1D7D7AA4D3241534DC01448A6E74',)
    assert settings.applications == '/srv/tentacle-a/app'


def test_a_change_keeps_what_it_does_not_know(tmp_path):
    path = settings_file(tmp_path, ORIGINALS_SETTINGS)
    before = tentacle.read_settings_file(path)
    tentacle.change_trust(
        path,
        add=[SHA1_TEXT.lower()],
        remove=['6B:67:4A:A1:DA:6D:1D:7D:7A:A4:D3:24:15:34:DC:01:44:8A:6E:74'],
    )
    after = tentacle.read_settings_file(path)
    assert json.loads(after.pop(tentacle.KEY_TRUSTED)) == [
        {
            'Thumbprint': SHA1_TEXT,
            'CommunicationStyle': 1,
            'Address': None,
            'Squid': None,
            'SubscriptionId': None,
        }
    ]
    del before[tentacle.KEY_TRUSTED]
    assert after == before
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    # and the original's reader would find its layout
    assert open_bytes(path).startswith(
        b'<?xml version="1.0" encoding="utf-8"?>\n<octopus-settings xmlns:xsi='
    )


def test_configure_resets_then_removes_then_adds(tmp_path):
    one, two, three = 'A' * 40, 'B' * 40, 'C' * 64
    assert cli('configure', '--trust', one, '--trust', two, '--trust', two, home=tmp_path)[
        1
    ] == 'Trusted to call this host: %s, %s\n' % (one, two)
    assert cli('configure', '--remove-trust', one, '--trust', three, home=tmp_path)[
        1
    ] == 'Trusted to call this host: %s, %s\n' % (two, three)
    assert (
        cli('configure', '--reset-trust', '--trust', one, home=tmp_path)[1]
        == 'Trusted to call this host: %s\n' % one
    )
    assert (
        cli('configure', '--reset-trust', home=tmp_path)[1] == 'Trusted to call this host: nobody\n'
    )


def test_changes_at_the_same_time_all_count(tmp_path):
    path = str(tmp_path / 'tentacle-default.config')
    thumbprints = ['%040X' % i for i in range(20)]
    threads = [
        threading.Thread(target=tentacle.change_trust, args=(path, [thumbprint]))
        for thumbprint in thumbprints
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tentacle.read_settings(path).trusted) == thumbprints


@pytest.mark.parametrize(
    'arguments, environment, expected',
    [
        (['--home', '{tmp}/a'], {'TENTACLE_HOME': '{tmp}/b'}, '{tmp}/a/tentacle-default.config'),
        ([], {'TENTACLE_HOME': '{tmp}/b'}, '{tmp}/b/tentacle-default.config'),
        ([], {}, '{tmp}/elsewhere/t.config'),
    ],
)
def test_where_the_home_is(tmp_path, monkeypatch, arguments, environment, expected):
    instances = tmp_path / 'machine' / 'Tentacle' / 'Instances'
    instances.mkdir(parents=True)
    record = {'Name': 'Tentacle', 'ConfigurationFilePath': str(tmp_path / 'elsewhere' / 't.config')}
    (instances / 'tentacle.config').write_text(json.dumps(record))
    monkeypatch.setenv('TentacleMachineConfigurationHomeDirectory', str(tmp_path / 'machine'))
    monkeypatch.delenv('TENTACLE_HOME', raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    home = arguments[1].format(tmp=tmp_path) if arguments else None
    assert tentacle.find_settings(home) == expected.format(tmp=tmp_path)


def test_a_missing_certificate_is_made_once(tmp_path):
    first = cli('show-thumbprint', home=tmp_path / 'home')
    assert re.match(r'[0-9A-F]{40}\Z', first[1])
    assert cli('show-thumbprint', home=tmp_path / 'home')[1:] == (first[1], '')
    assert (
        cli('new-certificate', '--if-blank', home=tmp_path / 'home')[1]
        == 'A certificate is there already, its thumbprint is %s\n' % first[1]
    )
    made = cli('new-certificate', home=tmp_path / 'home')[1]
    assert made != first[1] and cli('show-thumbprint', home=tmp_path / 'home')[1] in made
    values = tentacle.read_settings_file(str(tmp_path / 'home' / 'tentacle-default.config'))
    assert values['Tentacle.CertificateThumbprint'] in made
    assert values['TentaclePy.CertificateFile'] == 'tentacle.pem'
    assert values['Octopus.Home'] == str(tmp_path / 'home')


def test_what_is_read_while_a_file_is_replaced_is_not_taken(tmp_path):
    path, is_leaving = tmp_path / 'file', []

    def read():
        if is_leaving:
            path.unlink()  # by another program, between our look and our reading
        return path.read_text() if path.exists() else 'nothing'

    path.write_text('one')
    watched = tentacle.Watched(str(path), read)
    path.write_text('another')
    is_leaving.append(True)
    assert watched() == 'one' and not path.exists()
    is_leaving.clear()
    assert watched() == 'one'
    path.write_text('the third')
    assert watched() == 'the third'


TARGETS = '''# by hand
[web-1]
uri = https://web-1:10933/
thumbprint = %s

; another
[db]
thumbprint = %s
uri = db:1
''' % ('A' * 40, 'B' * 40)


def test_targets_by_name_and_by_address(tmp_path):
    (tmp_path / 'targets').write_text(TARGETS)
    targets = tentacle.Targets(str(tmp_path))
    for name in ('web-1', 'https://web-1/', 'WEB-1:10933'):
        assert targets.find(name) == tentacle.ServiceEndPoint('https://web-1:10933/', 'A' * 40)
    assert (
        targets.find('db')
        == targets.find('db:1')
        == tentacle.ServiceEndPoint('https://db:1/', 'B' * 40)
    )
    assert targets.find('other').thumbprint is None


MANY_TARGETS = '''# ours
[web-1]
uri = https://web-1/
groups = web, eu
[web-2]
groups = web us
proxy = http://proxy:3128
[db]
uri = poll://db/
groups = eu
'''


@pytest.mark.parametrize(
    'words, names',
    [
        ('web-1', 'web-1'),
        ('https://web-1:10933/ db', 'web-1 db'),
        ('@web', 'web-1 web-2'),
        ('@eu web-2 web-1', 'web-1 db web-2'),
        ('web-*', 'web-1 web-2'),
        ('*', 'web-1 web-2 db'),
        ('* !web-1', 'web-2 db'),
        ('* !@web', 'db'),
        ('!db *', 'web-1 web-2'),
        ('other:5', 'other:5'),
        ('[::1]', '[::1]'),
    ],
)
def test_choosing_targets(tmp_path, words, names):
    (tmp_path / 'targets').write_text(MANY_TARGETS)
    chosen = tentacle.Targets(str(tmp_path)).choose(words.split())
    assert list(chosen) == names.split()


@pytest.mark.parametrize(
    'words, error',
    [
        ('@nix', 'groups are: eu, us, web'),
        ('nix-*', 'names are: web-1, web-2, db'),
        ('* !web-3', 'misspelt'),
        ('!db', 'leaves out nothing'),
        ('db !db', 'No target is left'),
        ('ftp://x/', 'expected'),
    ],
)
def test_targets_that_mean_nothing(tmp_path, words, error):
    (tmp_path / 'targets').write_text(MANY_TARGETS)
    with pytest.raises(tentacle.UsageError, match=error):
        tentacle.Targets(str(tmp_path)).choose(words.split())


def test_the_proxy_of_a_target(tmp_path, monkeypatch):
    (tmp_path / 'targets').write_text(MANY_TARGETS)
    targets = tentacle.Targets(str(tmp_path))
    monkeypatch.setenv('HTTPS_PROXY', 'http://general:1')

    def proxy(name, proxy_of=None):
        endpoint = targets.find(name)._replace(thumbprint='0' * 40)
        return targets.to_call(name, endpoint, proxy_of).proxy

    assert proxy('web-1').host == 'general'
    assert proxy('web-2').host == 'proxy'
    assert proxy('web-2', lambda uri: None) is None
    assert proxy('db') is None


def test_pinning_keeps_the_rest_of_the_file(tmp_path):
    (tmp_path / 'targets').write_text(TARGETS)
    tentacle.Targets(str(tmp_path)).pin(
        'web-1', tentacle.ServiceEndPoint('https://web-1:10933/', 'C' * 40)
    )
    tentacle.Targets(str(tmp_path)).pin(
        'new', tentacle.ServiceEndPoint('https://new:10933/', 'D' * 40)
    )
    tentacle.Targets(str(tmp_path)).pin(
        '[::1]:5', tentacle.ServiceEndPoint('https://[::1]:5/', 'E' * 40)
    )
    text = (tmp_path / 'targets').read_text()
    assert text.startswith(TARGETS.replace('A' * 40, 'C' * 40))
    targets = tentacle.Targets(str(tmp_path))
    assert [targets.find(name).thumbprint[0] for name in ('web-1', 'db', 'new', '[::1]:5')] == list(
        'CBDE'
    )


# Of instances that the original (Octopus Tentacle 9 on Linux) made, on a machine with the
# machine-id of `Machine` and on one with a machine key file: its certificate as it stands in the
# settings, the thumbprint, and the proxy password `p@ss word`. They guard nothing.
ORIGINALS_MACHINE_KEY = '7QkTd8kGo6o2+s2rmZ4B1S+l7o+cEG4JUOqeqr/434w=.0lVoxxlLTfFQqbGXuXBIzg=='
ORIGINALS_INSTANCES = {
    'machine-id': (
        'MmKiLUVxo3btvVf4sF5Y6Q24wC8iV9EbHB+WSGW7M2d2YLzU6LffHxvc1YKZ5FjF58FckUMHEpRpT9nuwR8SoY44Ox'
        'aaNLDjw95238uvTXbqoEtufqIyvMmv3U/XOEGSrsmJJegDqKoDXX3bq4J8UF4DvTflFqRmUYvXPR3uXB3s7PFGsdSG'
        'tuLoPnCdf1oKB/NijK24ZN5leLW6cwPREL9y6fN8N40pLwsb1FWiaBKZNOczqzkcDlYQTc10s0KUbZCSzD/ivfN7vy'
        'RKhNOImzXhT8/ml3P66OU7ATFhQzBRmZQRaoAEoKv8ECrrrq8dCsK+4RaR++jyaCQP2z4a6UVG4j3I2HsNtPrLnVR1'
        'Dp48kmj5nvciuUpIA6zevGiz68uKcy+nm/4X0pIZwE0URTuPfWVrsiCZxwYaMokcxjXTdAeFb+bXfRnGx2WshW5HNE'
        'z86v1RdwT78IX6wRXPFgIkokVRBRSTGNoa7iwF/tfaGcS66kh0BGebH3AAXmwdaMw8WON+ycEvePGtxKuB2O7P2a/i'
        'OxfYCG9FBmZwKtcsLuTTbrfg9ZHpCt+NL/UTX3TTE3P1UgAORzRWS4xd/m+ua6kHMgL+tRd9gqVPU1Gv5udlAs/n0M'
        'tv/fDNpJ6uQIVcdypGPJ3dU1mtDB5pnzXGPbisgk1KjihMVs0KKiel1wJxfPiNxH3n5qhAtyc/aONGRDsh6TN1VVSr'
        'Fn+Ch7J64Nj3zdvhnkIDa5Azj1Ui4sphOSyPfVKSnqr/78YCuuKCXDQcwFEP0RlEme+PUWuoUXVHE0jAyRk5Dn7SiV'
        'pA9nTZh8SnfB5mcKUMpuGIrX6AxGhmFnZkcnDH2TlIsMDE/asqebBdl1y71rKp4a2dHx7bYQiEwPLoMLCl8VGqcJtd'
        'ycu/Kms/mnOiI8S5NnE1tVtTdX9VQTP4xKO/Hl0RvxZQNIbEYJ0pC5kIhQiRQtX7qnKREzufjrn1MuS/k+o1dJxM4x'
        'w8BGKdBDG5JUtGLVunbIrDM/WRKxUUIcXwbwKx8GoQ+05YO/bz3NCEAP7LPRM6ulqV61KiXI+Z3jg/5N3sPEoWKmBQ'
        'YBVl4CSdvgjmzqNs0PhP/OHcppKHRvmgaIMhxeMo2Vg+R/fgg/uWrHLwsvNWnJ2g7jX2GzYoj3JGDfhdxNj89pbqQM'
        'DBnWfPBf7k7UecEGdRgKvWUhRi0CST8J1nkqyYL/peHjLuRPIH72odFZdrFSBqCx8YKdn1UBRmGJsDmb4lRemX0lAB'
        'eVPshPin63TnaIO3SZ6rGlVWnZsfI5XhepvdoBnnQG0BqowX7gavrj4c8+3dX8a1wq1wle8QvaC1aiX26+pm2rbyJF'
        'S3feU8fTRy+kN2gZD2hb0o1YUOJmpZedtswI1q/jxRijKK8pMHs1iowLD5qIQvhCLPc4gVucK1VUA2S3eAsI9guNse'
        'DEbV7mrQUtOjjnE+LXxE7K7j2lUJXzidgZOKhc5amHRpGOluum4v1JS4+d/26VCrxbL9LNGmrrTA0fWe5YRqGscUp7'
        'Ty0h97Zl4f0bNfVvwxOUluGwRTaVv8EU7eAaVMg3Q3BHFt4WItIvoHARq6KfcFpxZYH4hAbN9qdRUkqamiCveb8azj'
        'Qpnv62Kbl2jdDa/o51nKQiXtyQ0DWcTOjP+2hMsAcnRkYWqForuIPwCxcl/McL5RrwwQo/Tcw18qYiHK7B1zHGHaoS'
        'GG3iSmIXlzLbBhpW/kz8KEO9FF11pNLRVIjgt579CZHgbmxWjaTCOFG4iUZ1l36c+y14h40Rb3fMPB8aYbtv1ZRvqa'
        'i2DNPBIzG5rPGXn4ZdFgeWnjPU0AM3dru2S2+aQggxd7GPKvpL8pwF58YPB9H6SmEmZajzf0rgxyZiEXq7ydMmwCVr'
        'cW7AUPFfVOocSrpohE93DoYoTEvRziMb0dMPpoIJd5/GFa0lIFYABChpNaGsVb+YBg0a7laMMiE7zuzY7NmuDWoVQO'
        'RDhvTZscM2SC/8hrWAEswsroKY0ZlyOog1wWsMoyl86Zt7zHCNFtOShHwWF8gV7R8SuBVphE5ED78A3M7BJz0b03bo'
        'nSa+se/28F1E8wfbAlOKkPOO7yZruaZzz9DDiFs5VB8NT4DmlSsQhzTET65P168v2kOpRw0g1qG2+Ejwk3yhE6uzU5'
        'fNz4+QcXu/nTrEbmMyVe9YGbwqNCdbojLblE+CTpz+fM/9imLAgDI2auXzS+3rkSI8F73Wsd46fFrWvo8TXHKbi1w+'
        'PqPjaoarklIedkuxqiM6bRuSf9FxqF+/IMYrU8EGu1nraXf5IzlEgu0t/bsb6TB6uB2Mbgsz7DVOyib3jrrmnKk2YS'
        'kPxBLU1sftlRo04Wspc1HpmdxeaD3+VteWNDGhLDK7fJgLpNQHcx8APHdz3tgG2a1I/pyhADFy0/CgMmAfBkAOWDGr'
        'rAV3ezbtNcv2kCaxQk72A8WjVbH6/rY5R/oJBrz28u3tv+x+WCoM1i6YkqjC/49rI25Td9jlaQubZ5H5ySu/CS7kX4'
        'ywHGZHgeEDRSNaxyCrW5CJQI1MGGxarEON4SKi8At1bP/1HuwXmNwFtPF9hG5zn8NDY9lrDbsTHM9QNqNaSPtBIoPW'
        'EYqOcuqnvuqHtknYh49V77Cy/AOdv/FmTA+mtvzNqzpNbiTPPMBXUBbsysk+aijEfkuvr4/jBf2GxJX7Jy9nBmHFKt'
        'vnYqPeKW/dgZfrj8CwfZ02CxdbzoJMeL9w3lgBNv2S/f8emuv4VSRggLZcDc3/cPKS9q6MwzulqJwPIp18fl5y5NQu'
        'RNDlpEa87aG2nUcSYpLhSI8o7hteCT75bVw+luKex5MC4d6PnPJv7JpQ7r8PoS87FRk+vROBCGNdz5qgw3OuQLbscu'
        'k6hHsqJ/0mIi+BY+Vnq6OGikAiLV5YwFs/pnB4+HqOrA0+Uaca+XHWeyE7FhEQXTynSf7faOYGqCKHyfBxEB1WcUMp'
        'mVJUR3+4ZkyR+E3CArlxIR2GOHpQPHxHr19WXACXKelejx4MmK2xAeUFGNLjfHHSr/a4PMB+BXujR4Yhst5Cwcnx7J'
        'IfiL8SkNFUqRYnjozK0rKsFsheYW/KFuZm1M7XhZLy438zyx3qDUNxZXMcpLC8sJkqpTi0l0EWdThMUlD7gEZKn2Vu'
        'WMFZLVgUWReWZxnazITBFDrw7NnEy7kynCI1HJm6wHHa3LIfDCqJuQgI450mA8sptB6xdeqQGhmE9q2BteAQ2z+SVE'
        'JGj0cZzZhRiYCNv1RWXThVpArDy0JcvYbWV6YO3OIU+R6dRGwmWxZKEWIk7kbDcA1p0rHScNSUSHIAiZB7a2v5Z1LY'
        'WpTe9RkbIRSzIcskP5hhE4UaPN7wopTrpiMSDIOnkyxLfwolEZ5akGu9KfrcR3Dnw2tIaumf9QHmu8W5RZz4ppd5cH'
        'LMgM6L+snujNCK5Q0oeimoRKQNBd/jL+pudMnqt+NhX+/d0EWgINMfoA98yRHvLCkqzEEIFS0/G8lxbY56FRAAKdR+'
        'KLONRuSAI1aa1B4x+ldnbhr7pZT8vfgSrB2I59o0/je2xjLv983dpw70a5BcYCFoi3ph1OMnbwXcpcoBDiI6y5G0E2'
        'umreUJHyY77q54Oeo/qG8gCaGrQR2srW2qFXokmr/3XplispUGdUKtxyJr3JCN39sBLTZA1GQu1JD9qkt0mv4i/ENn'
        'JEvlGG/zhYkQN3/ukjZiQe8vdkbt91yBderrQ88WIkB4X/8Dm7sE48k2khYOcyfijcFZrKi+IQiTmF/0qbFpKIyNgX'
        '7UkCYxso2rWHY2jKOQEU3TQFDPR/r5m7I00/5uxOIpYZcN40M/RknoJmiLJsbNXSMzna/+wP8S0gkHfPE7XWCc6K94'
        'DFv/cd7h7xbeEcMuSGMjB7FD5Ng7WBLHglQfEzsZ3dfCc+kL3HVvJmBJp4sFLtWu6bvDEwH+dTmna3SmFCGhCqR2uo'
        'dsbm4ndolDfzWG3qKO1lwb0Yamit3T/f8kwP0bhqbkXPLdbQ+bfI4y7r17CnsAymnBjb0+9kyI7wd196v1VQob991i'
        'eUk0GiebIKFOPVHRGQHE7mC6bLKlGkKIDNgj8FoHuhrfkG',
        '6D7A63503024C1F8CBD8B6EDCAFCD6C84726EFB3',
        'IoaKgZTA7Ef4PQzgvWV0zA==',
    ),
    'machinekey': (
        'JJILoffVgMdrId0b+558QbPQvI7zz5GZ4boLK+Anlii0qld/O1ia9aze7ysACWphwJtrMOHVmDIavmuFfbepCTK+Ry'
        'THuhNP9tMi4nVCgPaUv+Uf81zZSOcJqlE17TeikD4K/Xr/TNies2rhIX2EPQtRKqq0XTBkdkmgqNxTvHqxINBpkuUG'
        'FWC2V1A+9Ib3R1tr22ccXIIf5P2ARXowseqSKzVp+uG7mK/z1jN0YA7ZxNu2dKKKugEP79YM4XFVyhSztgA4wS3FcD'
        'Xxf8znhHcx1k8koPVwSIxkWwpC/uw76mwxERRrqO79fqThKNiGWcst0/wyCSRyBDueiaUjf6YfgHd4WPmiJPqehXYN'
        'ftkCR2m3vUDDs1B4j9JL5N/SkoclMC78PkEZlxaUl7GvCXxFOKcGUzaRortKlGf5ZaAMsSjNH8AJdYSxRVzAyQbgqe'
        'mhFkD9U9SeGHo42XT4StLezUTRkzQSuj8glAzKAhYCkIL9kchRWzKy8UI3jLDcM2geD/6WnFp2gb6TJJxLrsGxjXLx'
        'OoTsTUNGKrbs1Lkvsl0nBS9BJW026aaCziBRD6lxABpZ1MSx40cl3eku82hAsDUFzfU0L+VAw+Ny0iTFpHSOOGC6LO'
        'pbO+nmE7f/84tQgZ550snPncSvViNDLtjS2x+Jx0pBVWLYlVVo2xMTyPxK8SExsM9L4LEv0QVLGqxHKsI0F3yNXFOF'
        'OnLTzZWKnB3DcpBEcvS7MlBf0131Wrp3TnynUz9DuLbTpRWcnVDdlP+hCJlJnMRhDrWEqS+3dOSuXY3qsrkopAAwaf'
        'XtE5LtmCcu/k0o+x19ofpaLMzxBVH1i77A1mNWTlg1C4D9fl7ztIkgPQw2WeexW4cTBwyfcvLInmKqIpVi5hHdGnes'
        '9ASUsOZqMl2sR57MpavtWdzTGrezClzCauBLMPbIGunw/l69FrOHo+DJj+s+GJs4ZOAChmYID2/A2LBDUBsfcJa8g3'
        'BOOwJmG2gwmaBwBFUeAa+/B/EquQ5PUvRMnJgo2C87W+5xYK0UX+dzKVWCO0X9d+wTSd58DJoRXSnioka/JKMwvBPk'
        'YzarcK10snp7czUCk/IHfO4q82Hgnb6vNZzoqi9iAFsdkKKZ6U3fLEi57W2vCGRaNjWJqiW/RYOgMhyZwBiVLxVVRj'
        'xrZ6NlRwfOaLQ+G3ksn1Wki0gTMJq1jsnHK1STUwg+v5kzUeyEyMkYFyTq9Jr8iMZSHH0DTsioxqhGtPBaR5urGMQv'
        'NQ2eJa1TdN2RK9XczP7khNaKSrGHMpD5uJyWrcf5ymoDKRdxuF6AD81ys63kOJnOkGQmy0AHe5rsycGzVOZtuV0aPV'
        'vnUVxT0G3ENIgcyYAZ7nbdW/kf+YyWu8ptn7JKBmvWYU7wcfwuaNvVAT7SFN72MqHyZ8Ju5Jg5JnNXiJDu3WKh+FxU'
        'e+JQ2mCpj0f1GfOt7nvoofNtO/w5h7cVGA+HMVjZrLva5gQtKQwjw7GLpW+9KRuLFSPuFvQckg1yvknV6tcXPCnVzm'
        '6/gAaS7WY3PCmcD0fTveqgBYoV17mjtE1TCLv7h66TqNVhQgJES7tQp/nyrZFipEd41+0Zh/4OIFqvb5K8B1oRQJqW'
        'ToH4sasNim70FlWbQJt+tL8jIsocicp4NjR5cNWc6cSEwPRSugqNoQzCIir+pMuHwQxCFR3BARg0GRFsxZYVd6zGCW'
        'utjNO6yKaaI1x1Lp0Q49RveIHM9R/jU+APraR4cxgSOEeLmm9mZVFF/rQpzsiMe1nvoyTks67gEvWEdMysUaLR9zgr'
        'jSvz165LyAe7NeHe6zSvQ7J6zu8YReCtHf8YPJ/o4XY4MxhGGvCDtAhc5rPWBS1anF99Sq/IL3K/Wo5k81hMjebO8k'
        'beQea53+qCwzLsq7S/ziIWiThqJhqAk/idlTFALr3M+25MSsAzRZjYIDSePgSAIR0qqlAkaCAgeNTsfSWsmis4Jkp9'
        'pX3QVbfVsX5wTny2BqmdMx6wDOBETsAy+zHbgF4wBLbayJu3oYk/QWyApYdDlRxUSJECgu18of/q5MDqjG0Q556O5R'
        'VtgHWhTrEZWRDRjyuqx7yACo9QuynGO2A7TErTF8pp6EwpDOaqoni78NLA2nhBsqHsys+bIbDjppYQQJRo3tCf27F3'
        'cXy5xRYzmA2rU4zIrxtQbbtEbQOgYh2u9dLf61QwvVdVeiTtfg92DB2ZM/Gv1RF3C6hx2Fmew0OCy81lCwgbRH7Xs7'
        'G+j+KfcOmbmakFji2H/HlgcLSvIVFeHynLKBmBv5oeJlRsZT7VUp0GHnh7qdSM7sB9XyMLuz0vonbCsdiqbo26oTGt'
        'avjtdIxkElussu1dPCGkZhbCrCTJEssQuXjQDTaY4bchuIccTeov2//Zpl6SEry8zwwOd5BzvuASRlyOqycfDLTUZy'
        'UyuLQmlzBc4mptgiTAhBFliW9GottwfposZXMzmQoZceWq1gQIkwL714YRXljmldveJgzyjVkDc9Uy1fZtJmtfFJjq'
        'GIp7LyfG+YaA32CawlrrOyAFfZdtcLZs+veSEolFBLluorVl8s33bCoL4MQVJEkx5l0J2Z6T6aHG9jK7cuv1N1NnNN'
        'u9NuTH9LYTYZ1noy5nTelHQTOqz6dAk7pq4SkZoUJLw2dqlzv35f5YsxM574tQUEwCs6MX9aU9QVyR+rjnZIdKGcMl'
        'LZvB+wrMyEd6MBKpWEfMRLuKGS7/VyWiMSsY1wxhjO9MuFDRrJZD2k6dO5/omSb7lq36yZrY41KAu0an08FNgvxerx'
        'N/AEyorOP/a8unB+z7SPTYI8S7jTYpQKwYiPE8/MVjsxQY3a9hphShk3S/qbSgurqD6aBG8IRujyWJnpfFJtYAJa/v'
        'GoQySJZPb41RG6Ml9gmauXYLK9wiaDUd3DjDAV3poWmMfiCrZobXebP45Pa9ysNwrIedjU+7mEdNA8yVfwcl12mEuB'
        '5aOkM9ZGdBK9gQn2LjcZ/vehhnYCHyBmDAI9CrKQz2dMHz7MK/b2AydYBsV7JO7l1EiKuMVDZcQsvRUyscTVin0mRX'
        'SGEeD9MI7rNr/p6hIjd54fKX/AymPIg+F+QP/Zw5ASe0dsnLCs7gWs1p5aycbwHa03h8zvlB5FDATA9m2J0BDn4ryP'
        'zWxJxL8ZxBwtRrxoqjQLwHfCpWknQavQJQRW0R37CcImMqC92B16kf1mf+mipyI3MskcZ0OKX+gyQttpHjGvwds9Pj'
        'Zzslf6LE0EEU8DDBSu4/V55lPpnQPm6NQGqFjwvXGQbjbYYsRhm1K4IliV1UqicgWTDs15rDKdLlrB+5lxmKwndubE'
        'f8IxcMTm8ME0G7Oq/uzcnmDX+xyXwclioHtDA7Rpytn8bdKsziKJWPxe5rb5FyLi/p2328ADQvmrKwfkBYRIGA3mfc'
        'HDYrfVCcEAC1DfwNhSWQDc3za9hhTtkTys2RLt7BHHgrjPuwtRslKKZ7AKzoyX1T/KAjI1T9YTE+afOat1osdrhw8x'
        'jOxWfkUHs4OLaS+khRxPiypkgPzcz5wjIL4390IsplW8ytuBY8eEwGGQiDSOLqZZ5/Mb+AoYSPRhvppdqAFOZDfeS7'
        'ikfGcZXsYITyMUo6Ott/60SxKI9ma/EEHpLOhnLjM9KlNnT1ObqqHHX4U03R87at/E3J4Q70ezYWWkB1d4+9qooQ6q'
        '14Og3PGFBPNJGbDwJlhV4d2xdtRPDZYmvfnUQdfoWNkuBkccFOnVsWcK3CEETwW3U+1bV5XdJIeNEiopMeyv55RkeA'
        'aVh3pu8FSi+Ng7IgaWBZgSS8qTyHDLLYC+OZdm53Kst8ERdsPQn3W0pghUoqAu7oU3bag3/ov9RQOiT+VjrFU9qg0W'
        '25EVaHDLqfQtZnJ8f125jegtgmYAT4sdC+eS//3OoUsROVwYwCnlZEEiVddFQCEVYkKXORM5FB1pFmZu9OkDf3VxQX'
        'C5HhzWwjHOzKDKPUZF2x9hVlLdm8MUYkvgvvK/RWM/4QpQZ6RpXfIy731ziW9PRtuJAmDoxnapw7igyYevDOcWchpb'
        '9HYY+G47+9tw/JZW0Gf6rRUS9FYVgFJ7h624PDyNPNyOFQ',
        '6CD445BA66108F77287CC6E1ACCB23495280454E',
        'OfIsPuvTnVizItO+dNaDMw==',
    ),
}

# What its `new-certificate --export-pfx` (password `pfx pass`) and `--export-file` wrote, in
# base64; the latter is base64 itself, behind a BOM.
_PFX = (
    'MIII8wIBAzCCCK8GCSqGSIb3DQEHAaCCCKAEggicMIIImDCCA1cGCSqGSIb3DQEHBqCCA0gwggNEAgEAMIIDPQYJKoZIhv'
    'cNAQcBMCQGCiqGSIb3DQEMAQMwFgQQETVyp9GC9Ku+SqZSBUuwUwICB9CAggMIX0rxyjTAT3VHUw8/vfdzJRtUJ4HDeio1'
    'di3U/iqFuAcLRwlVmiHAY6mX9zXfUKM8M/IrF1/FflHQy660U4oLcGfYKFIwqEl6GDCJ671irWquQiFwhT2mNWBRfb3RRf'
    'hyp2N1JzR1i1TwX5Zp0yzux52gbyKZbFjj9JRdhaHupE34IGNHnDaE1yembWThpiBA/ipJaMT3iMkWwUo9rPhUXkm0I2Kw'
    'VQ+39aBrDpHs7BVdn95GvQwKfvSRvgNNBUccitTV3Ju0L6e7Ls4A7c913ZDg4WRwDBC7KnvpQ7KNFl12hLtscE3Vtukuga'
    'csTB7WO4hFq4EBYj2YuMbLYKlziEg4keYY+NyG2GRSwzl+VW7oxco9EQ88HRoxwl7JZyvlvdNUaaD1REn/Cdip4zM1nA0j'
    'X+NfqOFMrkOI1IfkwjFIK4/y9B+mbMOB9xszuEgF9PbPRN3CHzNw/4vSfAXyEPxXx1xxDuOzd7CakuWOaE3N7Z+uhMuIua'
    'hHVhJlKPL0e/o4Qba5rQ487nTVzdUNijwBRkDTBrbGUqgHpo/0stg03A/8OFqxw8F/S0Lpi6N0f338j80hfpbFUMLL+WbU'
    'HrQAPNWP7kTv4ZSg2rElBFoD9dsvo5eoHo/TqxEuFh/gTFMS943qhNUKc5p8epUnR4uI07QYc4uAr7xGc6IR6haWAHVHUS'
    '095knx8YSM2C8+ElkcK3Tdqp/nyObo0nlh9sQqDjcXSyHCEDqso0bo1CHihvvieMLnvispbhWAXKr0XUOUy6QZILiuI9HP'
    'tl25HlHuVI3Xbx8+LhFJFzUfvlbWYN/ogmrofXsu1zp4V89ut6o88eRROMyG0cbstLc6rcwZwpS9a1S9HLitLlf0DmUL96'
    'qTCl+ORBndI844lF0E6YpqU0Z9LiuCV6fGYr1Kr4LE0+F0aRihpxpaPBrY0GoBdpBiYDNPeCB5f+CSOPKEL79S8i4w4TS6'
    'NMimYWPhliTAv+eFFUBrNB5WbFGDck7jSTwlov0odF7lr9Sm+UKefbGi+e7tU1UwggU5BgkqhkiG9w0BBwGgggUqBIIFJj'
    'CCBSIwggUeBgsqhkiG9w0BDAoBAqCCBPYwggTyMCQGCiqGSIb3DQEMAQMwFgQQQf3b7pJ1UvnUM1llcud4zgICB9AEggTI'
    'uLY4FQqxJFqOR/EMwQBKtQ4OjWIIQHhiVt83/vH5CgSwWDuxnNBMOkNiC1d9EGiAVjmXgNt2MjHMu6Z7C7qvxbC8NOhDin'
    'yuS7UrkVr6/mb0vToWkucUXxMJTmobzL5ozZYbqluhEuf4qlzUUAC0TOsKLklgaJDC4aR+VRa6dU21jotuycBQX1pQWYBz'
    '76RA+m/mkmYosbXpV0MNj49RznAocLZxEedmzfURU7li+ESdspV/V/uNMjMWhTu9iE4ZhfkHlU8+SGXSMrXLyxVJ/0FWr/'
    'RX4+GNHx69/McZSAY3JGqYnQL3mCyBpK3W3qph6d9bYvC/Cx243Kxw+ILpUtNqRM242NODb63tfRGe5pMTfLPQmvrJVX+M'
    '4pHiaBqrNqKUB9OFBg0kPumd8sTYIF3mB1jv7GccAZRNFwa5e/skEhvYMLiwc1eXzQsPoEUMgEOniMkg7J2bp2o+klW1bN'
    'JEQ/lXa7Gsehr12F7ki2m8D3C68ZD7u+MJ6oPtyqm5qmBDIo+hs0nlPsIGoady6x+4RyHI4XFwa5jiDfAKQBuVVlQ1qZ6F'
    'uoglqQdiAKOQdR3lJTBu/WYX2p2GSUp+lrM9aemQaI2DpCe9uu1L8vNELDL4htTc/k7Mgc5+gNZiPRhNs8ace9lk0mSK7p'
    'HG7r2/ITdcnAr2kYM7u+356pmHPFWUSUWqsnYa2cJw3gMomXEulpEyL0TD+poDeaMDuNQ7WTeUxggGXGOCWJ6jt8ZMPFYQ'
    't4FmIIqG/e5pX6dU4b+hoYT3qq9qodrwSTZhmzULPmu6HO6x2Bmy8tV6iH50P2nUeqwU2SV6HUAq0Ahb87XRXuGIX4dObP'
    'pazElb6+cgHCVgkJle9+7008RmGHsrdAMwWiO1Jhb33IZArOuvJI70CuQTFa8sw/+cHDH9MjSi6CCH9JzLZ35WFW1/rOI4'
    'MtzYFfQZeAhqmhHQGkoGrAx4VU3CthO2neGmp8khRcIFefom0dFHec1cFE8l5TtoLvAYA7KWQNUamAE4H6dbQ5wU9HvXg3'
    '7IDHp0flMWvkNlpRfFf57hz80oVGC5/QF0OeOdxmfhh5NJQAnA6QL3Pt14ZSIw0uMfNrLYiq5c2ti9pZ1ZtiK9m+lALBfH'
    '7Ly3i1TdWEmQBU2P6nGY+bS3HBOfCsVak8zk8z6tj1EP5aUXfugngYD5lsTQGgOZ1Fp2pTm542oNMulF+ag94rR/t0IyG6'
    'uuTuE70yy8uo7BbTMx/af/6KwdoCE/lRdHB8m0iOfqkXDqfYIXZgOh4+J9Q9Jffv0Fh8LqvYEMF8d/vPQNJ3pg3MDzmp1t'
    'uPEEXbMsEgF91KE1A7cMaVZqi8kpja7QO0cLocuDm5pXtO2jjWxM0K4VufHfwFTguWEiWFSbgV76xXHq32p1QL4MmlHmqz'
    'JNiCqqV9VYudwCEP1/7beBvibFuNY1ApZnHq/b4cruu5BPW2ap/ovJ5lIBtLti2Gt3OWROGX41clwMkw7CTqlIztUmhY6s'
    'EY80HohyIkQnRg7gHH3XkIpHldJCnhiINTn7LfrxRIiUAQDzR88SNdT0GmYRsQOWG9tisoJyZnfLP3BSa/GVEpPgMY6NqF'
    '5UiZ/Kb1UbUmdsIFKDdyB4GHQfKVGqrK9MMRUwEwYJKoZIhvcNAQkVMQYEBAEAAAAwOzAfMAcGBSsOAwIaBBTWNZXihypd'
    'x78nFUb6JekE2YK94AQUFT2O7UJTpNnu0dd7L+DmaHsujYUCAgfQ'
)
_TEXT = (
    'MIII8wIBAzCCCK8GCSqGSIb3DQEHAaCCCKAEggicMIIImDCCA1cGCSqGSIb3DQEHBqCCA0gwggNEAgEAMIIDPQYJKoZIhv'
    'cNAQcBMCQGCiqGSIb3DQEMAQMwFgQQhOjS+o7oH4Y2z1VlsSW9GQICB9CAggMIMPO7Z2PKAKXs1vLFhR1rgjaGjVjxyM6j'
    '+9ohqgFtyjj/U7QaqbzM/RB7t95oPOf0w7jM/uFH21vgXI/ms7cUtQZF3aQtGCrQJetVnGCXFsxn2j6r2tkPKzAzaU5pVI'
    'yeyiAR7HjFwjUT8ZfDGQR1+3NkH39/lSmUGS8OUsoia5GX6qUEb4CNX0m02QG+qReShM+5Qj4xj4ISiVe85weaWspeFn9t'
    'J+551EDEBFu7KzRQ2b/fpKy/tl4D0sSLJMix4JJkLAYgar4bqP85mv8vOJPJ+luBR6GOM2Fjo1cwbzk18VKarPMJfNejFR'
    'H+2bQeSOoDMP4T9S78XdFq+HA13s1uoE9rvm2HmU8k+1ZUSGE6hwHzWUSFiCP9cmqMM231u4HEkvI3t1ysyKVIEgGBPuTP'
    'JBZIJtBvPnY7qWYiL5lDhzWclcu+HB66pf3W/GRrGj+kaEuUocBoIv7cm4x+1NA3IQ8vnVuU1BghEiNdhFzPcgr3A+WiRU'
    '+BSWPBI83TYMtf9zSnf2gJ5yR3duQQCzMQJJMvQ/pAKN7Zwpc1S/MRLGJbY3hlf0mfaACcjzo3/xjmIJNV5i7lj7/NOIUJ'
    'dtXF/boRC0lGtDq/jpMo7qrMSB7e9L1fYOFpzmK/ZynPbUrylp20pZ5NwWFLYtLkQBXG2j8U9SuuJ9v5Ta0B1RA9k4hol9'
    'IZg70o125sFpMf2ldjh4Qpd8+lU8WxTl6AmUdFbHNlSuR8G0sQkWrNsEaei7d7plgPsn9rmGcbzJcpL8VO7tbfk4bLke6U'
    '3R3gdAonbW/vk7FhoSstB5q3Fnmae37h7FX3Nxvh6yLJaBP0h0sXId2e30W9xINX/qt1318R5vLC3SiVxRanIeOhawlAro'
    'l0nji4GRtcMNoIVdi/6mjeDou3kW//9kJkeYpx6cis/as/PVHN7tuiAWzlriPnCF/jaP71C61EaQZgTcNtehJaeFAbVYXR'
    'j3j+SNUmusjJ0NZr5qfDNFeviHKJO7ZBUjwMHaLpW0iZhfGMl9Rb+orbMhT2cxowggU5BgkqhkiG9w0BBwGgggUqBIIFJj'
    'CCBSIwggUeBgsqhkiG9w0BDAoBAqCCBPYwggTyMCQGCiqGSIb3DQEMAQMwFgQQ20znBLXIWeK/8U59r006wgICB9AEggTI'
    'riOoGpBmS6lB+LlG4NVbhtIwnQIfDZ65jNdaqW5DInsC7zHvOkcE/aQFZxltBgWpL6Zqg0g+fBno77eErXNzn1hb3/8KUd'
    '+5zDj5E9tlAVyl2dyZtuRvZ9Fj3lML4tYM8lxGHsGZTVLW4WOpU62tmAMROv7O0cu+KHfkknC+Oi2aBra8Gj6BhaNG4Tqg'
    'yU7IT+Vb7vAFxnU2Jq5tgn74qxogbXUjZUI5LWdvzSRS0XMDj16VujOvmWoqNzM0Y5NRSVBraVV7R9i/nNN2l0p45KHUIv'
    'lZb5ApoJxK8ec6FdAzZ8yIIs+/ns5ABUT1WqsFWWZnkVOtwfqXZgsXV8mMhLjhGwMqDHe2pg3wwYEerzsCljLHQJVXInAv'
    'bO40O6r8+ECetE7MtJW3hPXdB9TZTji0aVVRYKxmGjL1TVyOW9f+mJrTPiWdATB+TX5RWVM1gUhDY/BSeSKuta+w3DN1L1'
    'ymXjoYYGGUB18yvexREtLPriburQ3ddMC5zMD/8EcEopILa/LY5/oJu0pV1EIwZJHy2pGtAgrdVu8Kyu+99FDTpClQb3cq'
    '1XZ0JHpVyX2G3mFhNQ14gBBXG2rbSu6E5zhiRj7OFQrmcHa8lbiqYWG2ay0ln/SaDtFLfEeFYfNARkrqhzUpUqaX1DDQBt'
    'UyGyBImkDAkYNwGbDm94MM3dkDkCnLJSGGS/wpoiW5F9QdfOwA+iZGwiJKBQcM1HwfBa/JPzqHxny6J+9CIN1sL/y+mDQ1'
    'ahnyGBxaYDxmdPkE2+yWxdpbzT15ZlDeH9tx7ZZft1clpGkQG0YU3yjKgJGICmoE4L2H07ZjdbnyO1w+3i9OPg0/4lgjz/'
    'J0R3jjPKTK3aDtYGMmey8BjZcJE9YsGRtHU+37OauQB5X8rRwbl2NLFfimjT8qdPNpylwsqZCvyLcnLfKZ0nTgaVhvkGL+'
    'oU8RSpkMkXZVD1iaUUrwqDbBs0KoDrK9kx5x9zz51bkUCzqu4fDlo+Fg0cTvfC4bn/ERi0HyVIszF+RsxkHOEabEdWbfA2'
    'jmRzrmu6JbSszCMgJTTU0MMl7R+BXrZxr3oZR1qVL/do8wucEJ/RqrROGPrKePP4Q8T7oAlRdkLk8sQoWJIVoBvkMgfV/a'
    'BPB1VJ3ZNwk4Cpsjqz/bNOvRGqIQM8qmVWo4JJ1jwoqOpsPjx5JsFOPUCURdOkP5RM2vsrhA5UrqVRXIO+1p8jjn36gHNu'
    '0rppfHhWT2fdmG6qVokiAr+y+XIofq8RKeYRzcEiOOgKuN1xqToMpxb7DKVe1l3U35DUnsfjIjL2fv43o9mcJx61LR3rcJ'
    'nPFoMIuCqWUPl7Gtd/uQBfU73uE7htPmePCRvmunKc0HPgcdkFLA/g6fTpAixi3xQFwNxYARUnrXwKyUSXCuRwEFai7gxP'
    'p9UiEbR7mTFYOLUNFAx1RJjVWgG0TWUZ38BzqkmLoWclubxq2lO6HydgxaFWqD89hmLw+28q+1gBIc7yeyX+dzgPvXrTEt'
    'oZCVkvVcoUOE1eBm4/rL6AORFpGb0E26CSW++bvt+YwKShERzyEE8wVVSRLh/teKiBY+tJjtlxvIPwEcgl/Hnb3jV3MKWj'
    'dNrWr7HRyf6QiYWsuTxn3ha+l/71sj3u2NMRUwEwYJKoZIhvcNAQkVMQYEBAEAAAAwOzAfMAcGBSsOAwIaBBSL3jsJOYIt'
    '/DShF8v6HfRWUBqr+AQUCdGgc6hgZKyvx6+5GuRx27FWjYYCAgfQ'
)
ORIGINALS_EXPORTS = {
    'exported.pfx': base64.b64decode(_PFX),
    'exported.txt': b'\xef\xbb\xbf' + _TEXT.encode(),
}


# ---- 18. Configuration: the original's instances, settings and certificates ----------------------

A_THUMBPRINT, B_THUMBPRINT, C_THUMBPRINT = 'A1' * 20, 'B2' * 20, 'C3' * 20

# What a person's environment may have, and a test's must not.
NOT_OURS = (
    'TENTACLE_HOME OCTOPUS_API_KEY TentaclePollingConnectionCount XDG_CONFIG_HOME XDG_RUNTIME_DIR '
    'HTTP_PROXY http_proxy PYTHONUNBUFFERED'
).split()

COMMAND_LINE = '''
import os, sys
sys.path.insert(0, %r)
import tentacle
tentacle.UNIT_FOLDER = %r
tentacle.MACHINE_ID_PATH, tentacle.MACHINE_KEY_PATH = %r, %r
%s
sys.exit(tentacle.main())
'''


def trusted_server(thumbprint, style=1, address=None, subscription=None):
    """An entry of Tentacle.Communication.TrustedOctopusServers, in the original's order."""
    return {
        'Thumbprint': thumbprint,
        'CommunicationStyle': style,
        'Address': address,
        'Squid': None,
        'SubscriptionId': subscription,
    }


def compact(value):
    return json.dumps(value, separators=(',', ':'))


def settings_of(path):
    """Keys and texts of a settings file, read apart from the program."""
    root = ElementTree.fromstring(open_bytes(str(path)))
    assert root.tag == 'octopus-settings'
    return {element.get('key'): element.text or '' for element in root}


def write_settings(path, values):
    """As another program writes them: a BOM, sorted, indented with tabs, empty elements."""
    root = ElementTree.Element('octopus-settings')
    root.text = '\n\t'
    for key in sorted(values):
        element = ElementTree.SubElement(root, 'set', key=key)
        element.text, element.tail = values[key] or None, '\n\t'
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    with open(str(path) + '.new', 'wb') as file:
        file.write(b'\xef\xbb\xbf<?xml version="1.0" encoding="utf-8"?>\r\n')
        file.write(ElementTree.tostring(root))
    os.replace(str(path) + '.new', str(path))


FORKS = '''
import json, os, signal, sys
sys.path.insert(0, %r)
import tentacle
for line in sys.stdin:
    code, words, folder, environment, streams = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        for number, path in enumerate([os.devnull] + streams):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[1:] = words
        exit_code = 99
        try:
            exec(code, {'__name__': '__main__'})
        except SystemExit as end:
            exit_code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    print(os.waitpid(child, 0)[1], flush=True)
'''


class Runner:
    """Runs command lines, each in a fork of a process that has imported the program already."""

    def __init__(self, folder, program):
        self.program = program
        self._streams = [os.path.join(folder, name) for name in ('out', 'err')]
        self._process = subprocess.Popen(
            [sys.executable, '-c', FORKS % os.path.dirname(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, code, words, folder, environment):
        """(exit code, stdout, stderr)"""
        for path in self._streams:
            open(path, 'wb').close()
        request = json.dumps([code, words, folder, environment, self._streams])
        self._process.stdin.write(request.encode() + b'\n')
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert os.WIFEXITED(status), status
        return (os.WEXITSTATUS(status),) + tuple(map(open_bytes, self._streams))

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Machine:
    """A machine below a folder: instances, units, machine keys, a user's home. `run(...)` is a
    command line there: its exit code, stdout and stderr as bytes.
    """

    def __init__(self, folder, runner):
        self.folder = str(folder)
        self.instances = os.path.join(self.folder, 'etc', 'Tentacle', 'Instances')
        self.units = os.path.join(self.folder, 'units')
        self.machine_id = os.path.join(self.folder, 'machine-id')
        self.machine_key = os.path.join(self.folder, 'machinekey')
        self.patches = ''
        self._runner = runner
        for folder in (self.instances, self.units):
            os.makedirs(folder)
        with open(self.machine_id, 'w') as file:
            file.write('0123456789abcdef0123456789abcdef\n')

    @property
    def code(self):
        return COMMAND_LINE % (
            os.path.dirname(self._runner.program),
            self.units,
            self.machine_id,
            self.machine_key,
            self.patches,
        )

    def environment(self, **changes):
        environment = dict(os.environ, HOME=self.folder)
        for name in NOT_OURS:
            environment.pop(name, None)
        environment['TentacleMachineConfigurationHomeDirectory'] = os.path.join(self.folder, 'etc')
        environment.update(changes)
        return environment

    def run(self, *arguments, cwd=None, **environment):
        environment = self.environment(**environment)
        return self._runner.run(self.code, arguments, cwd or self.folder, environment)

    def does(self, *arguments, **environment):
        """The stdout of a command that must succeed."""
        code, out, err = self.run(*arguments, **environment)
        assert code == 0, (out, err)
        return out.decode()

    def refuses(self, *arguments, **environment):
        """The one line of stderr of a command that must fail in a way the user can mend."""
        code, out, err = self.run(*arguments, **environment)
        assert (code, out) == (1, b''), (out, err)
        assert err.count(b'\n') == 1 and err.endswith(b'\n') and b'Traceback' not in err, err
        return err.decode()

    def add(self, name='Tentacle', identity=None, **values):
        """An instance that another program made; the path of its settings. Keys are written with
        __ for a full stop.
        """
        folder = os.path.join(self.folder, name)
        path = os.path.join(folder, 'tentacle.config')
        values = {key.replace('__', '.'): text for key, text in values.items()}
        values.setdefault('Octopus.Home', folder)
        os.makedirs(folder)
        if identity is not None:
            pem = os.path.join(folder, 'ours.pem')
            shutil.copy(identity.path, pem)
            os.chmod(pem, 0o600)
            values['TentaclePy.CertificateFile'] = 'ours.pem'
            values['Tentacle.CertificateThumbprint'] = identity.thumbprint
        write_settings(path, values)
        record = os.path.join(self.instances, name.lower().replace(' ', '-') + '.config')
        with open(record, 'w') as file:
            json.dump({'Name': name, 'ConfigurationFilePath': path}, file)
        return path


@pytest.fixture(scope='session')
def runner(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('program'))
    runner = Runner(folder, installed(folder)[0])
    yield runner
    runner.close()


@pytest.fixture
def machine(tmp_path, runner):
    return Machine(tmp_path, runner)


@pytest.fixture
def settings(machine, keys):
    """The settings file of the default instance of `machine`, that `keys['agent']` is."""
    return machine.add(
        identity=keys['agent'],
        Someone__Else='a <b> & "c" \u2713',
        Tentacle__Communication__TrustedOctopusServers=compact([trusted_server(A_THUMBPRINT)]),
    )


def trusted_in(path):
    return json.loads(settings_of(path)['Tentacle.Communication.TrustedOctopusServers'])


@pytest.mark.parametrize(
    'words',
    [
        ['--instance', 'My Box', '--config', 'box.config', '--home', 'D'],
        ['--instance=My Box', '--config=box.config', '--home=D'],
        ['/instance=My Box', '/config=box.config', '/home=D'],
        ['--INSTANCE', 'My Box', '/Config', 'box.config', '-Home', 'D'],
        ['-instance=My Box', '-config=box.config', '-home=D', '--noninteractive', '--nologo'],
    ],
)
def test_create_instance(machine, words):
    home = os.path.join(machine.folder, 'D')
    machine.does('create-instance', *[word.replace('D', home) for word in words])
    path = os.path.join(machine.folder, 'box.config')
    assert settings_of(path)['Octopus.Home'] == home
    assert open_bytes(path).startswith(
        b'<?xml version="1.0" encoding="utf-8"?>\n'
        b'<octopus-settings xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        b'xmlns:xsd="http://www.w3.org/2001/XMLSchema">\n  <set key="'
    )
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(os.path.join(machine.instances, 'my-box.config'), encoding='utf-8') as file:
        assert json.load(file) == {'Name': 'My Box', 'ConfigurationFilePath': path}


def test_an_instance_without_a_name_or_a_home(machine):
    path = os.path.join(machine.folder, 'some', 'where', 't.config')
    machine.does('create-instance', '--config', path)
    with open(os.path.join(machine.instances, 'tentacle.config'), encoding='utf-8') as file:
        assert json.load(file) == {'Name': 'Tentacle', 'ConfigurationFilePath': path}
    code, out, err = machine.run('show-configuration')
    assert (code, err) == (0, b'')
    assert json.loads(out)['Octopus']['Home'] == os.path.dirname(path)


def test_create_instance_keeps_settings_that_are_there(machine):
    path = os.path.join(machine.folder, 't.config')
    write_settings(path, {'Someone.Else': 'x', 'Tentacle.Services.PortNumber': '10950'})
    machine.does('create-instance', '--config', path)
    assert settings_of(path)['Someone.Else'] == 'x'
    assert settings_of(path)['Tentacle.Services.PortNumber'] == '10950'


def test_list_instances(machine):
    assert json.loads(machine.does('list-instances', '--format', 'json')) == []
    paths = {name: machine.add(name) for name in ('Tentacle', 'My Box')}
    code, out, err = machine.run('list-instances')
    assert (code, err) == (0, b'')
    assert sorted(out.decode().splitlines()) == [
        "Instance '%s' uses configuration '%s'." % entry for entry in sorted(paths.items())
    ]
    assert machine.run('list-instances', '--format=text') == (code, out, err)
    code, out, err = machine.run('list-instances', '--format=json')
    assert (code, err) == (0, b'')
    assert sorted(map(tuple, map(dict.values, json.loads(out)))) == sorted(paths.items())
    assert '"InstanceName": "My Box"' in out.decode()
    assert '"ConfigurationFilePath": "%s"' % paths['My Box'] in out.decode()


def test_delete_instance(machine):
    machine.add('Tentacle'), machine.add('My Box')
    machine.does('delete-instance', '--instance', 'My Box')
    assert os.listdir(machine.instances) == ['tentacle.config']
    assert 'My Box' not in machine.does('list-instances')
    assert 'My Box' in machine.refuses('delete-instance', '--instance', 'My Box')


@pytest.mark.parametrize('name', ['Tentacle', 'tentacle', 'TENTACLE'])
def test_names_of_instances_have_no_case(machine, settings, keys, name):
    assert machine.does('show-thumbprint', '--instance', name) == keys['agent'].thumbprint


def test_an_instance_by_the_path_of_its_settings(machine, keys):
    machine.add('Tentacle', keys['server'])
    path = machine.add('Other', keys['agent'])
    assert machine.does('show-thumbprint', '--config', path) == keys['agent'].thumbprint


def test_an_unknown_instance(machine):
    machine.add('Tentacle'), machine.add('My Box')
    line = machine.refuses('show-thumbprint', '--instance=nope')
    assert 'Instance nope of Tentacle has not been configured on this machine' in line
    instances = line.partition('Available instances:')[2]
    assert 'Tentacle' in instances and 'My Box' in instances


def test_settings_that_another_program_wrote(machine, settings):
    values = settings_of(settings)
    values.update({'Tentacle.Services.PortNumber': '', 'Tentacle.Services.ListenIP': '', 'X': ''})
    values['Tentacle.Services.NoListen'] = 'True'
    write_settings(settings, values)
    shown = json.loads(machine.does('show-configuration'))['Tentacle']
    assert shown['Services']['PortNumber'] == 10933 and shown['Services']['NoListen'] is True
    assert shown['Communication']['TrustedOctopusServers'] == [trusted_server(A_THUMBPRINT)]
    machine.does('configure', '--port', '10944')
    values['Tentacle.Services.PortNumber'] = '10944'
    assert settings_of(settings) == values
    assert (
        open_bytes(settings)
        .lstrip(b'\xef\xbb\xbf')
        .startswith(b'<?xml version="1.0" encoding="utf-8"?>\n<octopus-settings xmlns:xsi=')
    )


def test_styles_may_be_names(machine, settings):
    values = settings_of(settings)
    servers = [
        trusted_server(A_THUMBPRINT, 'TentaclePassive'),
        trusted_server(B_THUMBPRINT, 'TentacleActive', 'https://s:10943/', 'poll://x/'),
    ]
    values['Tentacle.Communication.TrustedOctopusServers'] = compact(servers)
    write_settings(settings, values)
    shown = json.loads(machine.does('show-configuration'))['Tentacle']['Communication']
    styles = [server['CommunicationStyle'] for server in shown['TrustedOctopusServers']]
    assert styles in ([1, 2], ['TentaclePassive', 'TentacleActive'])
    machine.does('configure', '--trust', C_THUMBPRINT)
    assert trusted_in(settings)[1]['SubscriptionId'] == 'poll://x/'


def test_instances_whose_settings_share_a_folder_are_different_ones(machine):
    for name in ('one', 'two'):
        path = os.path.join(machine.folder, name + '.config')
        machine.does('create-instance', '--instance', name, '--config', path)
        machine.does('new-certificate', '--if-blank', '--instance', name)
    thumbprints = {machine.does('show-thumbprint', '--instance', name) for name in ('one', 'two')}
    assert len(thumbprints) == 2


def test_a_lost_certificate_is_no_new_identity(machine, settings):
    os.unlink(our_pem(settings))
    before = open_bytes(settings)
    for command in ('show-thumbprint', 'agent'):
        assert 'Restore it' in machine.refuses(command)
    assert open_bytes(settings) == before
    assert 'A new certificate was made' in machine.does('new-certificate')


@pytest.mark.parametrize('name', ['../elsewhere.pem', '/etc/passwd', '..'])
def test_the_certificate_stands_beside_the_settings(machine, settings, name):
    values = settings_of(settings)
    write_settings(settings, dict(values, **{'TentaclePy.CertificateFile': name}))
    assert 'TentaclePy.CertificateFile' in machine.refuses('new-certificate')
    assert not os.path.exists(os.path.join(os.path.dirname(settings), '..', 'elsewhere.pem'))


def test_what_a_settings_file_can_not_hold(machine, settings):
    before = open_bytes(settings)
    assert 'can not hold' in machine.refuses('polling-proxy', '--proxyUsername', 'a\x01b')
    assert open_bytes(settings) == before


def test_the_only_instance_need_not_be_named(machine, keys):
    one = machine.add('One', keys['agent'])
    assert machine.does('show-thumbprint') == keys['agent'].thumbprint
    machine.add('Two', keys['other'])
    assert '--instance' in machine.refuses('show-thumbprint')
    home = os.path.dirname(one)
    assert machine.does('show-thumbprint', '--home', home) == keys['agent'].thumbprint
    machine.does('delete-instance', '--config', one)
    assert machine.does('show-thumbprint') == keys['other'].thumbprint


def test_instances_are_found_by_every_user(machine):
    machine.does('create-instance', '--config', os.path.join(machine.folder, 'a', 'a.config'))
    record = os.path.join(machine.instances, 'tentacle.config')
    assert stat.S_IMODE(os.stat(record).st_mode) == 0o644
    config = os.path.join(machine.folder, 'b', 'b.config')
    machine.does('create-instance', '--instance', 'My Inst', '--config', config)
    words = ['create-instance', '--instance', 'my-inst', '--config', config]
    assert 'has the same record' in machine.refuses(*words)


# ---- 18. Configuration: certificates -------------------------------------------------------------

needs_openssl = pytest.mark.skipif(not OPENSSL, reason='there is no openssl program here')


def our_pem(settings):
    """The path of our private key, as the settings name it."""
    name = settings_of(settings)['TentaclePy.CertificateFile']
    path = os.path.join(os.path.dirname(settings), name)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    return path


def test_new_certificate(machine):
    settings = machine.add()
    made = machine.does('new-certificate', '--if-blank')
    thumbprint = machine.does('show-thumbprint')
    assert re.match(r'[0-9A-F]{40}\Z', thumbprint) and thumbprint in made
    assert settings_of(settings)['Tentacle.CertificateThumbprint'] == thumbprint
    assert tentacle.load_identity(our_pem(settings)).thumbprint == thumbprint
    assert os.path.dirname(our_pem(settings)) == os.path.dirname(settings)
    before = open_bytes(settings)
    machine.does('new-certificate', '--if-blank')
    assert open_bytes(settings) == before and machine.does('show-thumbprint') == thumbprint
    other = machine.does('new-certificate')
    assert machine.does('show-thumbprint') in other and thumbprint not in other


def test_show_thumbprint(machine, settings, keys, tmp_path):
    thumbprint = keys['agent'].thumbprint
    assert machine.run('show-thumbprint') == (0, thumbprint.encode(), b'')
    quiet = ['--noconsolelogging', '--nologo', '--console', '--noninteractive']
    assert machine.run('show-thumbprint', *quiet) == (0, thumbprint.encode(), b'')
    text = '{"Thumbprint":"%s"}' % thumbprint
    assert machine.run('show-thumbprint', '--format=json') == (0, text.encode(), b'')
    machine.does('show-thumbprint', '--export-file', str(tmp_path / 'out'))
    assert open_bytes(str(tmp_path / 'out')) == thumbprint.encode()


@needs_openssl
@pytest.mark.parametrize('password', [None, '', 'pa ss"wörd'])
@pytest.mark.parametrize('legacy', [False, True])
def test_a_pfx_of_openssl_is_imported(machine, keys, tmp_path, password, legacy):
    settings, pfx = machine.add(), str(tmp_path / 'x.pfx')
    command = ['openssl', 'pkcs12', '-export', '-in', keys['other'].path, '-out', pfx]
    command += ['-passout', 'stdin']
    if legacy:
        command += ['-keypbe', 'PBE-SHA1-3DES', '-certpbe', 'PBE-SHA1-RC2-40', '-macalg', 'SHA1']
        helped = subprocess.run(['openssl', 'pkcs12', '-help'], stderr=subprocess.PIPE)
        command += ['-legacy'] if b'-legacy' in helped.stderr else []
    subprocess.run(command, input=(password or '').encode() + b'\n', check=True)
    words = [] if password is None else ['--pfx-password', password]
    machine.does('import-certificate', '--from-file', pfx, *words)
    assert machine.does('show-thumbprint') == keys['other'].thumbprint
    assert tentacle.load_identity(our_pem(settings)).thumbprint == keys['other'].thumbprint


def test_a_pem_is_imported(machine, keys):
    settings = machine.add()
    machine.does('import-certificate', '--from-file=' + keys['other'].path)
    assert machine.does('show-thumbprint') == keys['other'].thumbprint
    assert settings_of(settings)['Tentacle.CertificateThumbprint'] == keys['other'].thumbprint


@needs_openssl
@pytest.mark.parametrize('option', ['--export-pfx', '--export-file'])
def test_an_exported_certificate_is_for_another_host(machine, settings, keys, tmp_path, option):
    exported, before = str(tmp_path / 'exported'), open_bytes(settings)
    words = ['--pfx-password', 'p w'] if option == '--export-pfx' else []
    made = machine.does('new-certificate', option, exported, *words)
    assert stat.S_IMODE(os.stat(exported).st_mode) == 0o600
    assert open_bytes(settings) == before  # it is not installed here
    machine.add('Other')
    machine.does('import-certificate', '--instance=Other', '--from-file', exported, *words)
    thumbprint = machine.does('show-thumbprint', '--instance=Other')
    assert thumbprint in made and thumbprint != keys['agent'].thumbprint


@needs_openssl
@pytest.mark.parametrize(
    'name, words, thumbprint',
    [
        (
            'exported.pfx',
            ['--pfx-password', 'pfx pass'],
            '19BBE83D23BF285995AF6FB6AD413C6B7C73A646',
        ),
        ('exported.txt', [], '7D24D4218F0D23B5B86833AA8AC5F8EA00126C5C'),
    ],
)
def test_what_the_original_exported_is_imported(machine, tmp_path, name, words, thumbprint):
    machine.add()
    (tmp_path / name).write_bytes(ORIGINALS_EXPORTS[name])
    machine.does('import-certificate', '--from-file', str(tmp_path / name), *words)
    assert machine.does('show-thumbprint') == thumbprint


def test_without_openssl_the_error_says_how_to_convert(machine, settings, tmp_path):
    (tmp_path / 'x.pfx').write_bytes(ORIGINALS_EXPORTS['exported.pfx'])
    line = machine.refuses(
        'import-certificate', '--from-file', str(tmp_path / 'x.pfx'), PATH=str(tmp_path)
    )
    assert 'openssl pkcs12' in line


@pytest.fixture(params=['machine-id', 'machinekey'])
def original(request, machine):
    """(its settings file, its thumbprint, its proxy password as it stands there) of an instance
    that the original made on a machine with such a key.
    """
    certificate, thumbprint, password = ORIGINALS_INSTANCES[request.param]
    if request.param == 'machinekey':
        open(machine.machine_id, 'w').close()
        with open(machine.machine_key, 'w') as file:
            file.write(ORIGINALS_MACHINE_KEY)
    settings = machine.add(
        Octopus__Server__Proxy__ProxyHost='proxy.example',
        Octopus__Server__Proxy__ProxyPassword=password,
        Octopus__Server__Proxy__ProxyPort='3128',
        Octopus__Server__Proxy__ProxyUsername='agent',
        Octopus__Server__Proxy__UseDefaultProxy='false',
        Tentacle__Certificate=certificate,
        Tentacle__CertificateThumbprint=thumbprint,
        Tentacle__Communication__TrustedOctopusServers=compact([trusted_server(A_THUMBPRINT)]),
        Tentacle__Services__NoListen='false',
        Tentacle__Services__PortNumber='0',
    )
    return settings, thumbprint, password


@needs_openssl
def test_an_original_is_taken_over_where_it_stands(machine, original, monkeypatch, capsys, keys):
    settings, thumbprint, _ = original
    before = settings_of(settings)
    monkeypatch.setattr(tentacle, 'MACHINE_ID_PATH', machine.machine_id)
    monkeypatch.setattr(tentacle, 'MACHINE_KEY_PATH', machine.machine_key)
    assert tentacle.main(['show-thumbprint', '--config', settings]) == 0
    assert capsys.readouterr().out == thumbprint
    with running_agent(machine) as agent:  # with the same identity
        with dial(agent.port, keys['server']) as sock:
            shown = hashlib.sha1(sock.getpeercert(True)).hexdigest().upper()
    assert shown == thumbprint
    after = settings_of(settings)
    assert {key: after[key] for key in before} == before  # so that it can go back
    assert stat.S_IMODE(os.stat(our_pem(settings)).st_mode) == 0o600


def test_passwords_are_kept_as_the_original_keeps_them(machine, original):
    settings, _, password = original
    values = settings_of(settings)
    del values['Octopus.Server.Proxy.ProxyPassword']
    write_settings(settings, values)
    words = '--proxyEnable True --proxyHost proxy.example --proxyUsername agent --proxyPort 3128'
    machine.does('polling-proxy', *words.split(), '--proxyPassword', 'p@ss word')
    assert settings_of(settings)['Octopus.Server.Proxy.ProxyPassword'] == password


@needs_openssl
def test_another_machines_settings_are_not_taken_over(machine, original):
    settings, _, _ = original
    for path in (machine.machine_id, machine.machine_key):
        with contextlib.suppress(OSError):
            os.remove(path)
    before = open_bytes(settings)
    assert 'Tentacle.Certificate' in machine.refuses('agent')
    assert open_bytes(settings) == before


# ---- 19. Command line ----------------------------------------------------------------------------


@pytest.fixture
def several(dispatcher, shared_agent):
    """The home of a dispatcher that knows web-1, web-2 and a-target-with-a-long-name, in group
    live, and gone, which refuses connections.
    """
    home, _ = dispatcher
    with socket.create_server(('127.0.0.1', 0)) as server:
        refusing = server.getsockname()[1]
    sections = ''
    for name in ('web-1', 'web-2', 'a-target-with-a-long-name', 'gone'):
        port = refusing if name == 'gone' else shared_agent.port
        sections += '[%s]\nuri = https://127.0.0.1:%d/\nthumbprint = %s\n' % (
            name,
            port,
            shared_agent.identity.thumbprint,
        )
        sections += 'groups = live\n' if name != 'gone' else ''
    with open(os.path.join(home, 'targets'), 'w') as file:
        file.write(sections)
    return home


def test_exec_on_several(several):
    code, out, err = cli('exec', '@live', 'gone', '--', 'echo hi; echo err >&2', home=several)
    assert code == 1
    names = ['a-target-with-a-long-name |', 'web-1                     |']
    names.append(names[1].replace('1', '2'))
    assert sorted(out.splitlines()) == [name + ' hi' for name in names]
    for name in names:
        assert name + ' err\n' in err
    assert 'gone: 127.0.0.1:' in err and '1 of 4 failed: gone' in err
    assert cli('exec', 'web-*', '--', 'true', home=several) == (0, '', '')
    code, out, _ = cli('exec', 'web-*', '--quiet', '--', 'echo hi; exit 3', home=several)
    assert (code, sorted(out.splitlines())) == (1, ['web-1 3', 'web-2 3'])


def test_lines_of_a_target_together(several):
    body = 'for i in 1 2 3; do echo $i; sleep 0.3; done'
    _, out, _ = cli('exec', 'web-*', '--group-output', '--', body, home=several)
    numbers = [line.split(' | ') for line in out.splitlines()]
    assert [number for _, number in numbers] == ['1', '2', '3'] * 2
    assert len({name for name, _ in numbers[:3]}) == len({name for name, _ in numbers[3:]}) == 1


def test_results_as_events(several):
    code, out, err = cli('exec', 'web-1', 'gone', '--json', '--', 'echo hi; exit 3', home=several)
    assert (code, err) == (1, '')
    events = {}
    for line in out.splitlines():
        event = json.loads(line)
        events[event['event'], event['target']] = event
    line, result = events['line', 'web-1'], events['result', 'web-1']
    assert list(line) == ['event', 'target', 'source', 'time', 'text']
    assert (line['source'], line['text']) == ('stdout', 'hi')
    assert re.match(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\Z', line['time'])
    assert list(result) == ['event', 'target', 'state', 'exit_code', 'seconds', 'error']
    assert (result['state'], result['exit_code']) == ('failed', 3)
    gone = events['result', 'gone']
    assert (gone['state'], gone['exit_code']) == ('unreachable', None) and gone['error']


def test_targets_from_a_file(several, tmp_path):
    (tmp_path / 'list').write_text('# ours\nweb-1\n\nweb-2  # too\n')
    code, out, _ = cli('exec', '-t', str(tmp_path / 'list'), '--', 'echo hi', home=several)
    assert (code, sorted(out.splitlines())) == (0, ['web-1 | hi', 'web-2 | hi'])
    code, _, err = cli('exec', '-t', str(tmp_path / 'none'), '--', 'echo hi', home=several)
    assert code == 2 and str(tmp_path / 'none') in err


def test_ctrl_c_cancels_on_all(several, shared_agent):
    command = [
        sys.executable,
        PROGRAM,
        'exec',
        '--home',
        several,
        'web-*',
        '--',
        'echo on; sleep 99',
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = {process.stdout.readline() for _ in range(2)}
    assert lines == {b'web-1 | on\n', b'web-2 | on\n'}
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == b''
    assert b'once more' in err and b'2 of 2 failed: web-' in err and b'was cancelled' in err
    work = os.path.join(shared_agent.home, 'Work')
    eventually(lambda: not os.listdir(work))


def test_ctrl_c_twice_leaves_at_once(several):
    body = 'trap "" TERM; echo on; for i in 1 2 3 4 5 6 7 8 9; do sleep 0.5; done'
    command = [sys.executable, PROGRAM, 'exec', '--home', several, 'web-*', '--', body]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert b'once more' in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=1.5)  # the script is deaf for 2 s
    assert process.returncode == 130


@pytest.mark.parametrize('columns', [80, 40])
@pytest.mark.parametrize('coloured', [True, False])
def test_a_table_on_a_terminal(several, columns, coloured):
    command = [sys.executable, PROGRAM, 'exec', '--home', several, '@live', 'gone', '--', 'echo hi']
    environment = {'TERM': 'xterm', 'NO_COLOR': '' if coloured else '1'}
    code, shown = on_terminal(command, columns, **environment)
    assert code == 1 and ('\x1b[' in shown) == coloured
    plain = re.sub('\x1b\\[[0-9;]*m', '', shown).replace('\r', '').splitlines()
    start = next(i for i, line in enumerate(plain) if line.startswith('TARGET'))
    table = plain[start:]
    assert all(len(line) < columns for line in table[:5])
    assert re.match(r'gone +unreachable +- +\d', table[4]), table  # failures come last
    assert {line[:5] for line in table[1:4]} == {'web-1', 'web-2', 'a-tar'}
    assert table[5] == 'tentacle.py: 1 of 4 failed: gone'
    if coloured:
        assert '\x1b[31mgone' in shown and '\x1b[36m' in shown


def test_upload_to_several(several, tmp_path):
    (tmp_path / 'file').write_bytes(b'content')
    places = ['web-%d:%s' % (number, tmp_path / str(number)) for number in (1, 2)]
    code, out, err = cli('upload', str(tmp_path / 'file'), *places, 'gone:/x', home=several)
    assert code == 1 and 'gone:/x: ' in err and '1 of 3 failed: gone:/x' in err
    assert sorted(line.split(' (')[0] for line in out.splitlines()) == [
        'Uploaded to ' + place for place in places
    ]
    for number in (1, 2):
        assert (tmp_path / str(number)).read_bytes() == b'content'
    place = '@live:%s' % (tmp_path / 'same')
    assert cli('upload', '-', place, home=several, stdin=b'piped')[0] == 0
    assert (tmp_path / 'same').read_bytes() == b'piped'


def test_one_bar_for_several(several, tmp_path):
    (tmp_path / 'file').write_bytes(bytes(40 << 20))
    place = '@live:%s' % (tmp_path / 'copy')
    command = [sys.executable, PROGRAM, 'upload', '--home', several, str(tmp_path / 'file'), place]
    code, shown = on_terminal(command)
    assert code == 0 and '3 targets' in shown and 'of 125.8 MB' in shown


def test_targets_are_checked(several):
    code, out, err = cli('targets', '--check', 'web-1', 'gone', home=several)
    assert code == 1
    (_, good, bad) = out.splitlines()
    assert re.match(
        r'web-1 +ok +[\d.]+ +tentacle.py [\d.]+, 9[\d.]+ +IScriptService IFile.* IScriptServiceV2',
        good,
    )
    assert re.match('gone +unreachable +- +- +.*refuses', bad)
    code, out, _ = cli('targets', '--json', home=several)
    facts = [json.loads(line) for line in out.splitlines()]
    assert [fact['target'] for fact in facts[-4:]][0] == 'web-1'
    assert facts[-4]['groups'] == ['live'] and facts[-4]['address'] is None


def test_jobs_on_the_command_line(several, tmp_path, keys):
    code, _, err = cli('exec', 'web-1', '--detach', '--', 'true', home=several)
    assert code == 1 and 'tentacle.py serve' in err
    code, _, err = cli('jobs', home=several)
    assert code == 1 and 'exec --detach' in err
    cli('trust', 'poll://one/', keys['agent'].thumbprint, home=several)
    detach = ['exec', '--detach', '--json']
    with serving(several) as port:
        body = 'echo out; echo err >&2; exit 3'
        code, out, _ = cli(*detach, 'web-1', 'one', '--', body, home=several)
        jobs = [json.loads(line) for line in out.splitlines()]
        assert jobs == [{'job': 1, 'target': 'web-1'}, {'job': 2, 'target': 'one'}]
        code, out, err = cli('logs', '1', '-f', home=several)
        assert (code, out, err) == (0, 'out\n', 'err\n')
        code, out, _ = cli('jobs', '--all', home=several)
        assert re.search(r'^1 +web-1 +finished +3 ', out, re.M)
        assert re.search(r'^2 +one +waiting +- ', out, re.M)
        identity = tentacle.load_identity(os.path.join(several, 'tentacle.pem'))
        with polling(tmp_path, dict(keys_of(keys), server=identity), port):
            assert cli('logs', '2', '-f', home=several)[:2] == (0, 'out\n')
            assert cli(*detach, 'one', '--', 'echo on; sleep 100', home=several)[0] == 0
            follower = subprocess.Popen(
                [sys.executable, PROGRAM, 'logs', '3', '-f', '--home', several],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert follower.stdout.readline() == b'on\n'
            assert cli('cancel', '3', home=several)[1] == 'Job 3 is being cancelled\n'
            out, err = follower.communicate(timeout=20)
            assert (follower.returncode, out) == (1, b'') and b'Job 3: cancelled' in err
        code, out, _ = cli('job', '3', home=several)
        facts = json.loads(out)
        assert list(facts) == (
            'job target state exit_code error script created started ended expires'.split()
        )
        assert (facts['state'], facts['expires']) == ('cancelled', None)
        code, _, err = cli('job', '9', home=several)
        assert code == 2 and 'no job 9' in err
        code, _, err = cli('exec', 'one', '--detach', '--expires', 'soon', '--', 'x', home=several)
        assert code == 2 and '30m' in err
        code, _, err = cli('exec', 'one', '--detach', '--rolling', '1', '--', 'x', home=several)
        assert code == 2 and '--rolling does not go' in err
        dispatcher = tentacle.Dispatcher(several)
        assert list(dispatcher.submit(['web-*'], 'true').values()) == [4, 5]
        with dispatcher.job_store() as store:
            assert over(store, 5).exit_code == 0
    with dispatcher.job_store() as store:  # without `serve`
        assert len(store.jobs()) == 5


def test_a_job_of_a_target_that_is_none_any_more(several, tmp_path, keys):
    """It is not sent, and says why; with a new pin it is sent to that one."""
    cli('trust', 'poll://one/', '0' * 40, home=several)
    targets = pathlib.Path(several, 'targets')
    known = targets.read_text()
    with serving(several, '--trust', keys['agent'].thumbprint) as port:
        dispatcher = tentacle.Dispatcher(several)
        numbers = dispatcher.submit(['one', 'web-1'], 'true')
        with dispatcher.job_store() as store:
            assert over(store, numbers['web-1']).state == 'finished'
            targets.write_text(known.replace('[web-1]', '[web-9]').replace('[one]', '[two]'))
            identity = tentacle.load_identity(os.path.join(several, 'tentacle.pem'))
            number = dispatcher.submit(['web-9'], 'true')['web-9']
            assert over(store, number).state == 'finished'
            targets.write_text(known.split('[one]')[0])
            with polling(tmp_path, dict(keys_of(keys), server=identity), port):
                told = eventually(lambda: store.job(numbers['one']).error)
                assert 'one is not the target any more' in told
                assert store.job(numbers['one']).state == 'waiting'
                targets.write_text(known.replace('0' * 40, keys['agent'].thumbprint))
                assert over(store, numbers['one']).state == 'finished'


@pytest.mark.parametrize(
    'words, completed',
    [
        (['ex'], 'exec'),
        (['exec', '--gro'], '--group-output'),
        (['exec', 'web'], 'web-1 web-2'),
        (['exec', '--rolling', '2', 'gon'], 'gone'),
    ],
)
def test_completion_in_bash(several, words, completed):
    script = cli('completion', 'bash')[1] + 'COMP_WORDS=(tentacle.py %s); COMP_CWORD=%d; ' % (
        ' '.join(words),
        len(words),
    )
    script += '_tentacle_py; echo "${COMPREPLY[@]}"'
    environment = dict(os.environ, TENTACLE_HOME=several)
    done = subprocess.run(
        ['bash', '-c', script], stdout=subprocess.PIPE, env=environment, cwd=several
    )
    assert done.stdout.decode().strip() == completed


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_completion_is_sound(shell):
    code, out, _ = cli('completion', shell)
    assert code == 0 and all(name in out for name in tentacle.COMMANDS)
    if shutil.which(shell):
        done = subprocess.run([shell, '-n'], input=out.encode(), stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b'')


def test_what_a_long_call_waits_for(several, tmp_path):
    """Of one it is said how long ago it was seen, of several who they are."""
    cli('trust', 'poll://slow/', '0' * 40, home=several)
    with serving(several):
        command = [sys.executable, PROGRAM, 'exec', '--home', several, '--queue-timeout', '4']
        code, shown = on_terminal(command + ['slow', '--', 'x'])
        assert code == 1 and 'waiting for slow to poll; it has not been seen yet' in shown
        code, shown = on_terminal(command + ['slow', 'web-1', '--', 'sleep 4'])
        assert code == 1 and 'waiting for slow to poll; it has' in shown


@pytest.mark.parametrize(
    'words, hint',
    [(['exce'], 'did you mean exec?'), (['exec', '--gruop-output'], 'mean --group-output?')],
)
def test_what_may_be_meant(words, hint):
    code, _, err = cli(*words)
    assert code == 2 and hint in err


def test_trust_shows_asks_and_keeps(shared_agent, tmp_path):
    home, target = tmp_path / 'home', 'localhost:%d' % shared_agent.port
    thumbprint = shared_agent.identity.thumbprint
    code, out, err = cli('exec', target, '--', 'true', home=home)
    assert (
        code == 1
        and 'tentacle.py trust --home %s %s' % (home, target) in err
        and err.count('\n') == 1
    )
    code, out, err = cli('trust', target, home=home, stdin=b'n\n')
    assert code == 1 and thumbprint in out and not (home / 'targets').exists()
    code, out, err = cli('trust', target, home=home, stdin=b'y\n')
    assert code == 0 and stat.S_IMODE((home / 'targets').stat().st_mode) == 0o600
    assert 'already' in cli('trust', target, home=home)[1]


def test_a_changed_thumbprint_is_refused_loudly(shared_agent, tmp_path):
    home, target = tmp_path / 'home', 'localhost:%d' % shared_agent.port
    tentacle.Targets(str(home)).pin(
        target, tentacle.ServiceEndPoint('https://%s/' % target, SHA1_TEXT)
    )
    cli('show-thumbprint', home=home)
    code, out, err = cli('exec', target, '--', 'true', home=home)
    assert (code, out, err.count('\n')) == (1, '', 1)
    assert (
        'IS NOT THE PINNED ONE' in err
        and SHA1_TEXT in err
        and shared_agent.identity.thumbprint in err
    )
    code, out, err = cli('trust', target, home=home, stdin=b'')
    assert code == 1 and 'IT HAS CHANGED' in err
    assert cli('trust', '--yes', target, home=home)[0] == 0
    assert tentacle.Targets(str(home)).find(target).thumbprint == shared_agent.identity.thumbprint


def test_a_tentacle_that_does_not_trust_us(shared_agent, tmp_path):
    home, target = tmp_path / 'home', 'localhost:%d' % shared_agent.port
    assert cli('trust', '--yes', target, home=home)[0] == 0
    code, out, err = cli('exec', target, '--', 'true', home=home)
    ours = cli('show-thumbprint', home=home)[1]
    assert (code, out, err.count('\n')) == (1, '', 1)
    assert 'configure --trust ' + ours in err


@pytest.mark.parametrize(
    'arguments, code, words',
    [
        ([], 2, ''),
        (['frob'], 2, "'frob' is not supported"),
        (['listen', '--port', 'x'], 2, 'is not a port'),
        (['listen', '--port', '70000'], 2, 'is not a port'),
        (['listen', '--trust', 'abc'], 2, 'is not a thumbprint'),
        (['configure', '--trust', 'abc'], 1, 'is not a thumbprint'),
        (['configure'], 1, 'Nothing to change'),
        (['trust', 'a b'], 2, 'is not a target'),
        (['exec', 'host'], 2, '--script FILE'),
        (['exec', 'host', '--script', '/no/such/script'], 2, 'can not be read'),
        (['exec', 'poll://x/', '--', 'true'], 1, 'no server runs'),
        (['exec', 'host.invalid', '--', 'true'], 1, 'trust --home'),
        (['trust', 'host.invalid'], 1, 'does not resolve'),
        (['trust', 'localhost:1'], 1, 'refuses connections'),
    ],
)
def test_bad_command_lines(tmp_path, arguments, code, words):
    got, out, err = cli(*arguments, home=tmp_path / 'home') if arguments else cli()
    assert got == code
    assert words in err and 'Traceback' not in err
    assert (
        len(
            [
                line
                for line in err.splitlines()
                if 'INFO' not in line and not line.startswith('usage')
            ]
        )
        <= 1
    )


def test_scripts_that_can_not_be_sent(tmp_path):
    (tmp_path / 'empty').write_bytes(b' \n')
    (tmp_path / 'latin').write_bytes(b'echo \xe4\n')
    for name, words in (('empty', 'is empty'), ('latin', 'is not UTF-8 (byte 5)')):
        code, _, err = cli('exec', 'host', '--script', str(tmp_path / name), home=tmp_path / 'home')
        assert code == 2 and words in err and err.count('\n') == 1
    assert not (tmp_path / 'home').exists()


def test_a_port_in_use(shared_agent, tmp_path):
    cli('show-thumbprint', home=tmp_path / 'home')
    code, out, err = cli('listen', '--port', str(shared_agent.port), home=tmp_path / 'home')
    assert (code, err.count('\n')) == (1, 1) and 'Port %d is in use' % shared_agent.port in err
    assert 'Listener started' not in out


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_home_that_can_not_be_written_by_a_user(tmp_path):
    (tmp_path / 'closed').mkdir(mode=0o500)
    for arguments in (
        ['show-thumbprint'],
        ['listen', '--port', '0'],
        ['configure', '--trust', SHA1_TEXT],
    ):
        code, out, err = cli(*arguments, home=tmp_path / 'closed' / 'home')
        assert code == 1 and '--home DIR' in err.splitlines()[-1] and 'Traceback' not in err


def test_a_home_that_can_not_be(tmp_path):
    (tmp_path / 'file').write_text('')
    for arguments in (
        ['show-thumbprint'],
        ['listen', '--port', '0'],
        ['configure', '--trust', SHA1_TEXT],
    ):
        code, out, err = cli(*arguments, home=tmp_path / 'file' / 'home')
        assert code == 1 and 'home' in err.splitlines()[-1] and 'Traceback' not in err


def test_a_key_that_others_may_read_is_warned_of(tmp_path):
    cli('show-thumbprint', home=tmp_path)
    os.chmod(str(tmp_path / 'tentacle.pem'), 0o644)
    code, out, err = cli('show-thumbprint', home=tmp_path)
    assert (
        code == 0
        and len(out) == 40
        and 'WARNING' in err
        and 'chmod 600' in err
        and err.count('\n') == 1
    )


@pytest.mark.parametrize(
    'name, content, words',
    [
        ('tentacle.pem', 'rubbish', 'can not be used'),
        (
            'tentacle.pem',
            '-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n',
            'can not be used',
        ),
        ('tentacle-default.config', '<octopus-settings><set key=', 'are damaged'),
        ('tentacle-default.config', '', 'are damaged'),
        ('tentacle-default.config', '<other/>', 'is no settings file'),
        (
            'tentacle-default.config',
            '<octopus-settings><set key="Tentacle.Communication.TrustedOctopusServers">[{</set>'
            '</octopus-settings>',
            'is damaged',
        ),
        (
            'tentacle-default.config',
            '<octopus-settings><set key="Tentacle.Services.PortNumber">x</set></octopus-settings>',
            'must be a number',
        ),
    ],
)
def test_damaged_files_are_named_and_left(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    for arguments in (['show-thumbprint'], ['listen', '--port', '0']):
        code, out, err = cli(*arguments, home=tmp_path)
        assert (code, err.count('\n')) == (1, 1) and words in err and name in err
    assert (tmp_path / name).read_text() == content


def test_a_damaged_targets_file(tmp_path):
    (tmp_path / 'targets').write_text('uri = x\n')
    code, _, err = cli('exec', 'host', '--', 'true', home=tmp_path)
    assert (code, err.count('\n')) == (1, 1) and 'targets' in err and 'line' in err


def answering(serve):
    """(port, thread) of a TCP server that treats one connection."""
    server = socket.create_server(('127.0.0.1', 0))

    def run():
        with server:
            sock, _ = server.accept()
            with sock, contextlib.suppress(OSError):
                serve(sock)

    thread = threading.Thread(target=run)
    thread.start()
    return server.getsockname()[1], thread


def test_a_target_that_is_not_tls(tmp_path):
    cli('show-thumbprint', home=tmp_path)
    port, thread = answering(lambda sock: sock.sendall(b'SSH-2.0-OpenSSH_9\r\n') or sock.recv(1000))
    code, _, err = cli('trust', 'localhost:%d' % port, home=tmp_path)
    thread.join()
    assert (code, err.count('\n')) == (1, 1) and 'does not speak the TLS we need' in err


def test_a_target_that_is_tls_but_no_tentacle(tmp_path, keys):
    home = tmp_path / 'home'
    cli('show-thumbprint', home=home)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys['other'].path)

    def web_server(sock):
        with context.wrap_socket(sock, server_side=True) as secure:
            came = b''
            while b'CLIENT' not in came:
                came += secure.recv(1000)
            secure.sendall(b'HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n')

    port, thread = answering(web_server)
    target = 'localhost:%d' % port
    tentacle.Targets(str(home)).pin(
        target, tentacle.ServiceEndPoint('https://%s/' % target, keys['other'].thumbprint)
    )
    code, _, err = cli('exec', target, '--', 'true', home=home)
    thread.join()
    assert (code, err.count('\n')) == (1, 1) and 'does not speak Halibut' in err


def test_help_of_every_verb_has_an_example(capsys):
    overview = cli('--help')[1]
    for name in tentacle.COMMANDS:
        assert '\n  %s ' % name in overview
        if not tentacle.COMMANDS[name].is_original:
            with pytest.raises(SystemExit):
                tentacle.main([name, '--help'])
            assert 'example:\n  tentacle.py %s' % name in capsys.readouterr().out


def test_demo():
    code, out, err = cli('demo')
    assert code == 0 and 'Hello from' in out and 'exit code 7' in out and 'Done' in out


# ---- 19. Command line: help and version ----------------------------------------------------------

HELP = '''Usage: Tentacle %s [<options>]

Where [<options>] is any of:\x20

      --format=VALUE         The format of the output (text,json). Defaults\x20
                               to text.

Or one of the common options:\x20

      --help                 Show detailed help for this command
'''

HELP_JSON = '''{
  "Name": "version",
  "Description": "Show the Tentacle version information",
  "Aliases": [],
  "Options": [
    {
      "Name": "format",
      "Description": "The format of the output (text,json). Defaults to text."
    }
  ],
  "CommonOptions": [
    {
      "Name": "help",
      "Description": "Show detailed help for this command"
    }
  ]
}'''


@pytest.mark.parametrize('words', [[], ['']])
def test_no_command(machine, words):
    code, out, err = machine.run(*words)
    assert (code, err) == (2, b'')
    assert out.startswith(b'Usage: Tentacle <command> [<options>]\n')
    assert b'Or use <command> --help for more details.' in out
    assert machine.run('help') == (0, out, b'')


def test_an_unknown_command(machine):
    code, out, err = machine.run('unknown-command')
    assert code == 2
    assert err.startswith(b"Command 'unknown-command' is not supported")
    assert out.startswith(b"See 'Tentacle help'")
    assert machine.run('help', 'unknown-command')[1:] == (out, err)


@pytest.mark.parametrize(
    'words, named',
    [
        (['version', '--unknown=argument'], '--unknown=argument'),
        (['version', '--unknown', 'argument'], '--unknown argument'),
        (['version', '/unknown=argument'], '/unknown=argument'),
        (['version', 'extra'], 'extra'),
        (['list-instances', '--instanse', 'x'], '--instanse x'),
    ],
)
def test_unknown_arguments(machine, words, named):
    assert 'Unrecognized command line arguments: ' + named in machine.refuses(*words)


@pytest.mark.parametrize('command', ['version', 'show-thumbprint', 'list-instances'])
def test_an_unsupported_format(machine, settings, command):
    line = machine.refuses(command, '--format=unsupported')
    assert "The format 'unsupported' is not supported. Try text or json." in line


@pytest.mark.parametrize(
    'words, named',
    [
        (['help', '--help'], 'help'),
        (['version', '--help'], 'version'),
        (['help', 'version'], 'version'),
        (['/version', '/help'], 'version'),
    ],
)
def test_help_of_a_command(machine, words, named):
    assert machine.run(*words) == (0, (HELP % named).encode(), b'')


def test_help_of_a_command_as_json(machine):
    assert machine.run('version', '--help', '--format=json') == (0, HELP_JSON.encode(), b'')
    assert machine.run('help', 'version', '--format', 'json') == (0, HELP_JSON.encode(), b'')


def test_every_command_has_help_without_an_instance(machine):
    code, out, err = machine.run('help', '--format', 'json')
    assert (code, err) == (0, b'')
    listed = json.loads(out)['Commands']
    assert all(entry['Description'] and entry['Aliases'] is not None for entry in listed)
    names = {entry['Name'] for entry in listed}
    missing = set(ORIGINALS_COMMANDS) - names
    assert missing == set()
    for name in sorted(names):
        code, out, err = machine.run(name, '--help')
        assert (code, err) == (0, b'')
        assert out.startswith(b'Usage: Tentacle %s [<options>]\n' % name.encode()), name
        described = json.loads(machine.does(name, '--help', '--format=json'))
        assert described['Name'] == name
        options = [option['Name'] for option in described['Options']]
        assert set(ORIGINALS_COMMANDS.get(name, '').split()) <= set(options), name
        assert len(options) == len(set(options)), name


# What the original's documentation uses of each command.
ORIGINALS_COMMANDS = {
    'agent': 'instance config wait',
    'configure': 'instance config home app port noListen listenIpAddress pollingConnectionCount '
    'trust remove-trust reset-trust',
    'create-instance': 'instance config home',
    'delete-instance': 'instance',
    'deregister-from': 'instance config server apiKey space multiple',
    'deregister-worker': 'instance config server apiKey space multiple',
    'help': 'format',
    'import-certificate': 'instance config from-file pfx-password',
    'list-instances': 'format',
    'new-certificate': 'instance config if-blank export-pfx pfx-password',
    'poll-server': 'instance config server apiKey server-comms-address server-comms-port '
    'reuse-server-thumbprint',
    'polling-proxy': 'instance config proxyEnable proxyHost proxyPort proxyUsername proxyPassword',
    'proxy': 'instance config proxyEnable proxyHost proxyPort proxyUsername proxyPassword',
    'register-with': 'instance config server apiKey name space env role tenant tenanttag '
    'tenanted-deployment-participation policy proxy publicHostName force comms-style '
    'server-comms-address server-comms-port server-subscription-id tentacle-comms-port '
    'apiKey-file server-thumbprint insecure',
    'register-worker': 'instance config server apiKey name space workerpool policy proxy '
    'publicHostName force comms-style server-comms-address server-comms-port '
    'server-subscription-id tentacle-comms-port apiKey-file server-thumbprint insecure',
    'server-comms': 'instance config thumbprint style host port web-socket',
    'service': 'instance config install uninstall start stop restart reconfigure username',
    'set-polling-connection-count': 'instance config pollingConnectionCount',
    'show-configuration': 'instance config file',
    'show-thumbprint': 'instance config export-file format',
    'update-trust': 'instance config oldThumbprint newThumbprint',
    'version': 'format',
}


def test_version(machine):
    code, out, err = machine.run('version')
    assert (code, err) == (0, b'') and re.match(rb'\d+\.\d+\.\d+\S*\Z', out)
    for words in (['--version'], ['/version'], ['version', '--format=text']):
        assert machine.run(*words) == (0, out, b'')
    for word in ('--noconsolelogging', '--nologo', '--console', '--noninteractive'):
        assert machine.run('version', word) == (0, out, b'')
    code, listed, err = machine.run('version', '--format=json')
    listed = json.loads(listed)
    assert (code, err) == (0, b'')
    assert listed['InformationalVersion'] == out.decode()
    assert re.match(r'\d+\.\d+\.\d+\Z', listed['MajorMinorPatch'])
    assert out.decode().startswith(listed['MajorMinorPatch'])
    assert None not in (listed['NuGetVersion'], listed['SourceBranchName'])
    assert tentacle.TENTACLE_VERSION in listed.values()
    assert listed['TentaclePyVersion'] == tentacle.__version__


# ---- 19. Command line: what the commands leave in the settings -----------------------------------

TRUSTED = 'Tentacle.Communication.TrustedOctopusServers'


@pytest.mark.parametrize(
    'words, changed',
    [
        (['--home', '/x/home'], {'Octopus.Home': '/x/home'}),
        (['--app=/x/app'], {'Tentacle.Deployment.ApplicationDirectory': '/x/app'}),
        (['--port', '10950'], {'Tentacle.Services.PortNumber': '10950'}),
        (['/port=0'], {'Tentacle.Services.PortNumber': '0'}),
        (['--noListen', 'True'], {'Tentacle.Services.NoListen': 'true'}),
        (['--noListen=false'], {'Tentacle.Services.NoListen': 'false'}),
        (['--listenIpAddress', '127.0.0.1'], {'Tentacle.Services.ListenIP': '127.0.0.1'}),
        (['--listenIpAddress', '::1'], {'Tentacle.Services.ListenIP': '::1'}),
        (
            ['--pollingConnectionCount', '7'],
            {'Tentacle.Communication.PollingConnectionCount': '7'},
        ),
        (
            ['--trust', B_THUMBPRINT.lower()],
            {TRUSTED: compact([trusted_server(A_THUMBPRINT), trusted_server(B_THUMBPRINT)])},
        ),
        (['--trust', A_THUMBPRINT], {}),
        (['--remove-trust', A_THUMBPRINT], {TRUSTED: '[]'}),
        (['--remove-trust', A_THUMBPRINT, '--trust', A_THUMBPRINT], {}),
        (['--trust', A_THUMBPRINT, '--remove-trust', A_THUMBPRINT], {}),
        (
            ['--trust', C_THUMBPRINT, '--reset-trust', '--trust', B_THUMBPRINT],
            {TRUSTED: compact([trusted_server(C_THUMBPRINT), trusted_server(B_THUMBPRINT)])},
        ),
        (
            ['--port', '1', '--app', '/y', '--noListen', 'True', '--reset-trust'],
            {
                'Tentacle.Services.PortNumber': '1',
                'Tentacle.Deployment.ApplicationDirectory': '/y',
                'Tentacle.Services.NoListen': 'true',
                TRUSTED: '[]',
            },
        ),
    ],
)
def test_configure_the_original(machine, settings, words, changed):
    expected = dict(settings_of(settings), **changed)
    machine.does('configure', '--instance', 'Tentacle', *words)
    assert settings_of(settings) == expected


def test_configure_listens_on_any_address_again(machine, settings):
    machine.does('configure', '--listenIpAddress', '127.0.0.1')
    machine.does('configure', '--listenIpAddress', 'any')
    assert settings_of(settings).get('Tentacle.Services.ListenIP', '') == ''
    assert json.loads(machine.does('show-configuration'))['Tentacle']['Services']['ListenIP'] in (
        None,
        '',
    )


def test_update_trust_keeps_how_a_server_is_reached(machine, settings):
    values = settings_of(settings)
    server = trusted_server(B_THUMBPRINT, 2, 'https://s:10943/', 'poll://x/')
    values[TRUSTED] = compact([trusted_server(A_THUMBPRINT), server])
    write_settings(settings, values)
    words = ['--oldThumbprint', B_THUMBPRINT, '--newThumbprint', C_THUMBPRINT.lower()]
    machine.does('update-trust', *words)
    server['Thumbprint'] = C_THUMBPRINT
    values[TRUSTED] = compact([trusted_server(A_THUMBPRINT), server])
    assert settings_of(settings) == values


def test_server_comms(machine, settings):
    machine.does(
        'server-comms', '--thumbprint', A_THUMBPRINT, '--style', 'TentacleActive', '--host', 'srv'
    )
    (server,) = [server for server in trusted_in(settings) if server['CommunicationStyle'] == 2]
    assert server['Address'].rstrip('/') == 'https://srv:10943'
    assert re.match(r'poll://[a-z0-9]{20}/\Z', server['SubscriptionId'])
    words = ['--style=TentacleActive', '--host=other', '--port=10999']  # the only one is meant
    machine.does('server-comms', *words)
    machine.does('server-comms', *words)
    polled = [entry for entry in trusted_in(settings) if entry['CommunicationStyle'] == 2]
    addresses = sorted(entry['Address'].rstrip('/') for entry in polled)
    assert addresses == ['https://other:10999', 'https://srv:10943']
    assert {entry['SubscriptionId'] for entry in polled} == {server['SubscriptionId']}
    machine.does('server-comms', '--style', 'TentaclePassive')
    assert trusted_server(A_THUMBPRINT) in trusted_in(settings)


@pytest.mark.parametrize(
    'command, prefix', [('proxy', 'Octopus.Proxy.'), ('polling-proxy', 'Octopus.Server.Proxy.')]
)
def test_proxies_are_kept(machine, settings, command, prefix):
    def kept():
        values = settings_of(settings)
        names = ('UseDefaultProxy', 'ProxyHost', 'ProxyPort', 'ProxyUsername', 'ProxyPassword')
        return [values.get(prefix + name, '') for name in names]

    machine.does(command, '--proxyEnable', 'True')
    assert kept()[:2] == ['true', '']
    words = '--proxyEnable=True --proxyHost=px --proxyPort=3128 --proxyUsername=u'
    machine.does(command, *words.split(), '--proxyPassword=p@ss word')
    assert kept()[:4] == ['false', 'px', '3128', 'u']
    assert kept()[4] == ORIGINALS_INSTANCES['machine-id'][2]
    assert b'p@ss word' not in open_bytes(settings)
    machine.does(command, '--proxyEnable', 'False')
    assert kept()[:2] == ['false', '']
    others = {'proxy': 'Octopus.Server.Proxy.', 'polling-proxy': 'Octopus.Proxy.'}[command]
    assert not [key for key in settings_of(settings) if key.startswith(others)]


CONFIGURATION = '''{
  "Octopus": {
    "Home": "%(home)s",
    "Watchdog": {
      "Enabled": false,
      "Instances": "*",
      "Interval": 0
    }
  },
  "Tentacle": {
    "CertificateThumbprint": "%(thumbprint)s",
    "Communication": {
      "PollingConnectionCount": %(count)s,
      "TrustedOctopusServers": [
        {
          "Thumbprint": "%(server)s",
          "CommunicationStyle": %(style)s,
          "Address": %(address)s,
          "Squid": null,
          "SubscriptionId": %(subscription)s
        }
      ]
    },
    "Deployment": {
      "ApplicationDirectory": "%(home)s/appdir"
    },
    "Services": {
      "ListenIP": null,
      "NoListen": %(no_listen)s,
      "PortNumber": %(port)s
    }
  }
}
'''


@pytest.mark.parametrize(
    'server, no_listen, port, count',
    [
        (trusted_server(A_THUMBPRINT), 'false', '10950', '5'),
        (
            trusted_server(A_THUMBPRINT, 2, 'https://localhost:1', 'poll://subscription/'),
            'true',
            '10933',
            '1',
        ),
    ],
)
def test_show_configuration(machine, keys, tmp_path, server, no_listen, port, count):
    home = os.path.join(machine.folder, 'Tentacle')
    settings = machine.add(
        identity=keys['agent'],
        Tentacle__Communication__TrustedOctopusServers=compact([server]),
        Tentacle__Communication__PollingConnectionCount=count,
        Tentacle__Deployment__ApplicationDirectory=home + '/appdir',
        Tentacle__Services__NoListen=no_listen,
        Tentacle__Services__PortNumber=port,
    )
    before = open_bytes(settings)
    expected = CONFIGURATION % {
        'home': home,
        'thumbprint': keys['agent'].thumbprint,
        'count': count,
        'server': A_THUMBPRINT,
        'style': server['CommunicationStyle'],
        'address': json.dumps(server['Address']),
        'subscription': json.dumps(server['SubscriptionId']),
        'no_listen': no_listen,
        'port': port,
    }
    assert machine.run('show-configuration') == (0, expected.encode(), b'')
    machine.does('show-configuration', '--file', str(tmp_path / 'out'))
    assert open_bytes(str(tmp_path / 'out')).decode().strip() == expected.strip()
    assert open_bytes(settings) == before


def test_show_configuration_of_an_instance_that_was_just_made(machine):
    machine.does('create-instance', '--config', os.path.join(machine.folder, 't.config'))
    code, out, err = machine.run('show-configuration')
    shown = json.loads(out)
    assert (code, err) == (0, b'')
    assert shown['Octopus']['Home'] == machine.folder
    assert shown['Tentacle']['CertificateThumbprint'] is None
    assert shown['Tentacle']['Communication']['TrustedOctopusServers'] == []
    assert shown['Tentacle']['Services']['PortNumber'] == 10933
    assert shown['Tentacle']['Services']['NoListen'] is False


def test_set_polling_connection_count(machine, settings):
    machine.does('set-polling-connection-count', '--pollingConnectionCount', '5')
    assert settings_of(settings)['Tentacle.Communication.PollingConnectionCount'] == '5'


# Command lines that are wrong, and words of which the complaint must have one.
BAD_LINES = [
    ('create-instance --config', '--config'),
    ('create-instance --frob x --config {tmp}/n.config', 'Unrecognized'),
    ('delete-instance --instance nope', 'nope'),
    ('list-instances --format xml', 'xml'),
    ('new-certificate --instance nope', 'nope'),
    ('new-certificate --export-pfx {tmp}/noise/x.pfx --pfx-password p', '{tmp}/noise'),
    ('new-certificate --if-blank --export-pfx {tmp}/x.pfx', '--if-blank'),
    ('import-certificate', '--from-file'),
    ('import-certificate --from-file', '--from-file'),
    ('import-certificate --from-file {tmp}/missing', '{tmp}/missing'),
    ('import-certificate --from-file {tmp}/noise', '{tmp}/noise'),
    ('import-certificate --from-file {tmp}', '{tmp}'),
    ('show-thumbprint --config {tmp}/missing.config', '{tmp}/missing.config'),
    ('show-thumbprint --config {tmp}/noise', '{tmp}/noise'),
    ('show-thumbprint --export-file {tmp}/no/such/x', '{tmp}/no/such'),
    ('show-configuration --instance nope', 'nope'),
    ('show-configuration --file {tmp}/no/such/x', '{tmp}/no/such'),
    ('configure --instance nope --port 1', 'nope'),
    ('configure --port', '--port'),
    ('configure --port 65536', '65536'),
    ('configure --port -1', '-1'),
    ('configure --port 80x', '80x'),
    ('configure --app /y --port 65536', '65536'),
    ('configure --trust %s --port 65536' % B_THUMBPRINT, '65536'),
    ('configure --trust abc', 'abc'),
    ('configure --app /y --trust %s' % (B_THUMBPRINT + '0'), 'thumbprint'),
    ('configure --remove-trust %s' % B_THUMBPRINT[1:], 'thumbprint'),
    ('configure --noListen perhaps', 'perhaps'),
    ('configure --noListen', '--noListen'),
    ('configure --listenIpAddress not.an.address', 'not.an.address'),
    ('configure --pollingConnectionCount 0', '0'),
    ('configure --pollingConnectionCount 513', '513'),
    ('configure --pollingConnectionCount many', 'many'),
    ('configure --frob 1', 'Unrecognized command line arguments: --frob 1'),
    ('configure frob', 'Unrecognized command line arguments: frob'),
    ('set-polling-connection-count', '--pollingConnectionCount'),
    ('set-polling-connection-count --pollingConnectionCount 0', '0'),
    ('set-polling-connection-count --pollingConnectionCount 513', '513'),
    ('set-polling-connection-count --pollingConnectionCount x', 'x'),
    ('update-trust', '--oldThumbprint'),
    ('update-trust --oldThumbprint %s' % A_THUMBPRINT, '--newThumbprint'),
    ('update-trust --oldThumbprint %s --newThumbprint x' % A_THUMBPRINT, 'x'),
    ('update-trust --oldThumbprint x --newThumbprint %s' % A_THUMBPRINT, 'x'),
    ('server-comms', '--style'),
    ('server-comms --style Odd', 'style'),
    ('server-comms --style TentacleActive', '--host'),
    ('server-comms --style TentacleActive --host h --port 65536', '65536'),
    ('server-comms --style TentacleActive --host h/x', 'h/x'),
    ('server-comms --style TentacleActive --web-socket http://h/', 'web'),
    ('server-comms --style TentacleActive --host h --thumbprint x', 'x'),
    ('server-comms --style TentacleActive --host h --thumbprint %s' % C_THUMBPRINT, C_THUMBPRINT),
    ('proxy --proxyEnable perhaps', 'perhaps'),
    ('proxy --proxyEnable True --proxyHost p --proxyPort 65536', '65536'),
    ('polling-proxy --proxyEnable perhaps', 'perhaps'),
    ('polling-proxy --proxyEnable True --proxyHost p --proxyPort x', 'x'),
    ('polling-proxy --instance nope --proxyEnable True', 'nope'),
    ('poll-server', '--server'),
    ('poll-server --server ftp://h/ --apiKey K', 'ftp://h/'),
    ('poll-server --server http://127.0.0.1:1/', '--apiKey'),
    ('poll-server --server http://127.0.0.1:1/ --apiKey K', '127.0.0.1:1'),
    ('register-with --apiKey K --env E --role r', '--server'),
    ('register-with --server http://h:x/ --apiKey K --env E --role r', 'h:x'),
    ('register-with --server no.scheme --apiKey K --env E --role r', 'no.scheme'),
    (
        'register-with --server http://127.0.0.1:1/ --apiKey K --env E --role r '
        '--comms-style TentacleActive --proxy P',
        '--proxy',
    ),
    ('register-with --server http://127.0.0.1:1/ --env E --role r', '--apiKey'),
    ('register-with --server http://127.0.0.1:1/ --apiKey K --role r', '--env'),
    ('register-with --server http://127.0.0.1:1/ --apiKey K --env E', '--role'),
    ('register-with --server http://127.0.0.1:1/ --apiKey K --env E --role r', '127.0.0.1:1'),
    (
        'register-with --server http://127.0.0.1:1/ --apiKey K --env E --role r --comms-style Odd',
        'Odd',
    ),
    (
        'register-with --server http://127.0.0.1:1/ --apiKey K --env E --role r '
        '--tentacle-comms-port 65536',
        '65536',
    ),
    (
        'register-with --server http://127.0.0.1:1/ --apiKey-file {tmp}/missing --env E --role r',
        '{tmp}/missing',
    ),
    ('register-with --server http://h/ --apiKey K --env E --role r --server-thumbprint x', 'x'),
    (
        'register-with --server http://127.0.0.1:1/ --apiKey K --env E --role r '
        '--tenanted-deployment-participation Odd',
        'Odd',
    ),
    ('register-with --instance nope --server http://h/ --apiKey K --env E --role r', 'nope'),
    ('register-worker --server http://127.0.0.1:1/ --apiKey K', '--workerpool'),
    ('register-worker --server http://127.0.0.1:1/ --apiKey K --workerpool P', '127.0.0.1:1'),
    ('register-worker --server http://127.0.0.1:1/ --apiKey K --workerpool P --role r', '--role'),
    ('deregister-from', '--server'),
    ('deregister-from --server http://127.0.0.1:1/', '--apiKey'),
    ('deregister-from --server http://127.0.0.1:1/ --apiKey K', '127.0.0.1:1'),
    ('deregister-worker --server gopher://h/ --apiKey K', 'gopher://h/'),
    ('service --instance nope --install', 'nope'),
    ('service --frob', 'Unrecognized'),
    ('agent --instance nope', 'nope'),
    ('agent --wait x', 'x'),
    ('agent --frob', 'Unrecognized'),
    ('run --instance nope', 'nope'),
]


@pytest.mark.parametrize('line, named', BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_a_bad_command_line_changes_nothing(machine, settings, tmp_path, line, named):
    (tmp_path / 'noise').write_bytes(b'no certificate and no settings at all')
    before, files = open_bytes(settings), sorted(os.listdir(os.path.dirname(settings)))
    complaint = machine.refuses(*line.format(tmp=tmp_path).split())
    assert named.format(tmp=tmp_path).lower() in complaint.lower()
    assert open_bytes(settings) == before
    assert sorted(set(os.listdir(os.path.dirname(settings))) - {'Logs'}) == files
    assert os.listdir(machine.instances) == ['tentacle.config']
    assert os.listdir(machine.units) == []


@needs_openssl
def test_a_wrong_pfx_password_changes_nothing(machine, settings, tmp_path):
    (tmp_path / 'x.pfx').write_bytes(ORIGINALS_EXPORTS['exported.pfx'])
    before = open_bytes(settings)
    line = machine.refuses(
        'import-certificate', '--from-file', str(tmp_path / 'x.pfx'), '--pfx-password', 'geheim'
    )
    assert 'password' in line and 'geheim' not in line
    assert open_bytes(settings) == before


def test_damaged_settings_are_left_alone(machine, settings):
    with open(settings, 'ab') as file:
        file.write(b'<')
    before = open_bytes(settings)
    for words in (['configure', '--port', '1'], ['show-configuration'], ['agent']):
        assert settings in machine.refuses(*words)
    assert open_bytes(settings) == before


# ---- 19. Command line: registration --------------------------------------------------------------

API_KEY = 'API-GEHEIM0123456789ABCDEF'


def resources(kind, *names):
    """Documents of a REST collection."""
    return [
        {'Id': '%s-%d' % (kind, number), 'Name': name, 'Slug': name.lower().replace(' ', '-')}
        for number, name in enumerate(names, 1)
    ]


class OctopusServer:
    """The REST side of an Octopus Server, over TLS when it has an identity. `seen`: (method, path)
    of each request; `changes`: (method, path, document) of those that it took; `refusal`: (status,
    document) for changes. `machines` and `workers` can be set.
    """

    def __init__(self, thumbprint, identity=None):
        self.thumbprint = thumbprint
        self.spaces = [
            dict(space, IsDefault=space['Name'] == 'Default')
            for space in resources('Spaces', 'Default', 'Other')
        ]
        self.lists = {
            'environments': resources('Environments', 'Test', 'Live Site'),
            'tenants': resources('Tenants', 'Tenant A'),
            'workerpools': resources('WorkerPools', 'Default Worker Pool', 'Big'),
            'machinepolicies': resources('MachinePolicies', 'Default', 'Quick Policy'),
            'proxies': resources('Proxies', 'Proxy 1'),
            'tagsets': [
                {'Id': 'TagSets-1', 'Name': 'Region', 'Tags': [{'CanonicalTagName': 'Region/EU'}]}
            ],
            'machines': [],
            'workers': [],
        }
        self.refusal = None
        self.front_page = 200
        self.seen, self.changes, self.keys = [], [], []
        octopus = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, status, document):
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                length = int(self.headers.get('Content-Length') or 0)
                sent = json.loads(self.rfile.read(length)) if length else None
                key = self.headers.get('X-Octopus-ApiKey')
                self.answer(*octopus.answer(self.command, self.path, key, sent))

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, *details):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = False

            def handle_error(self, request, address):
                pass  # who does not like our certificate hangs up

        self._server = Server(('127.0.0.1', 0), Handler)
        self.port = self._server.server_address[1]
        if identity is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(identity.path)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = '%s://127.0.0.1:%d' % ('https' if identity else 'http', self.port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method, path, key, sent):
        path = urllib.parse.urlsplit(path).path
        self.seen.append((method, path))
        self.keys.append(key)
        if path == '/':
            return self.front_page, {}
        if path.rstrip('/') == '/api':
            links = {'Self': '/api', 'Spaces': '/api/spaces'}
            return 200, {'Application': 'Octopus Deploy', 'Version': '2024.1.1', 'Links': links}
        if key != API_KEY:
            return 401, {'ErrorMessage': 'You must be logged in to perform this action.'}
        if path == '/api/spaces/all':
            return 200, self.spaces
        if path == '/api/configuration/certificates/certificate-global':
            return 200, {'Id': 'certificate-global', 'Thumbprint': self.thumbprint}
        place = re.match(r'/api(?:/(Spaces-\d+))?/(\w+)/?(.*)', path)
        space, collection, name = place.groups() if place else (None, '', '')
        there = [d for d in self.lists.get(collection, []) if d.get('Links') == {'Self': path}]
        is_known = space in [entry['Id'] for entry in self.spaces] or not (space or self.spaces)
        if not is_known or not (name == 'all' or there or method == 'POST'):
            return 404, {'ErrorMessage': 'The resource you requested was not found.'}
        if method == 'GET':
            return 200, self.lists[collection] if name == 'all' else there[0]
        if self.refusal is not None:
            return self.refusal
        self.changes.append((method, path, sent))
        listed = self.lists[collection]
        if method == 'POST':
            document = dict(sent, Id='%s-%d' % (collection.title(), len(listed) + 1))
            document['Links'] = {'Self': '%s/%s' % (path, document['Id'])}
            document['Thumbprint'] = sent['Endpoint']['Thumbprint']
            listed.append(document)
            return 201, document
        (old,) = there
        listed.remove(old)
        if method == 'PUT':
            listed.append(dict(old, **sent))
        return 200, sent or {}


@pytest.fixture
def octopus(keys):
    """A server without TLS, whose agents' side is `keys['server']`."""
    server = OctopusServer(keys['server'].thumbprint)
    yield server
    server.close()


@pytest.fixture
def secure_octopus(keys):
    server = OctopusServer(keys['server'].thumbprint, keys['octopus'])
    yield server
    server.close()


def registering(octopus, *words, command='register-with', name='web-1', key=API_KEY):
    line = [command, '--server', octopus.url, '--name', name, '--publicHostName', 'Web-1.example']
    if key is not None:
        line += ['--apiKey', key]
    if command == 'register-worker':
        return line + ['--workerpool', 'Default Worker Pool'] + list(words)
    return line + ['--env', 'Test', '--role', 'web-server'] + list(words)


def test_a_listening_target_is_registered(machine, settings, octopus, keys):
    before = settings_of(settings)
    machine.does(*registering(octopus))
    ((method, path, posted),) = octopus.changes
    assert (method, path) == ('POST', '/api/Spaces-1/machines')
    assert posted.pop('MachinePolicyId', None) is None
    assert posted == {
        'Name': 'web-1',
        'EnvironmentIds': ['Environments-1'],
        'Roles': ['web-server'],
        'TenantIds': [],
        'TenantTags': [],
        'TenantedDeploymentParticipation': 'Untenanted',
        'Endpoint': {
            'CommunicationStyle': 'TentaclePassive',
            'Uri': 'https://web-1.example:10933/',
            'Thumbprint': keys['agent'].thumbprint,
            'ProxyId': None,
        },
    }
    assert trusted_in(settings) == [
        trusted_server(A_THUMBPRINT),
        trusted_server(keys['server'].thumbprint),
    ]
    before[TRUSTED] = settings_of(settings)[TRUSTED]
    assert settings_of(settings) == before


def test_a_registration_with_all_options(machine, settings, octopus, keys):
    machine.does(
        *registering(octopus, '--env', 'live-site', '--role', 'db', '--space', 'OTHER'),
        *['--tenant', 'Tenant A', '--tenanttag', 'Region/EU', '--proxy', 'Proxy 1'],
        *['--tenanted-deployment-participation', 'TenantedOrUntenanted'],
        *['--policy', 'Quick Policy', '--tentacle-comms-port', '10955'],
    )
    assert octopus.changes == [
        (
            'POST',
            '/api/Spaces-2/machines',
            {
                'Name': 'web-1',
                'EnvironmentIds': ['Environments-1', 'Environments-2'],
                'Roles': ['web-server', 'db'],
                'TenantIds': ['Tenants-1'],
                'TenantTags': ['Region/EU'],
                'TenantedDeploymentParticipation': 'TenantedOrUntenanted',
                'MachinePolicyId': 'MachinePolicies-2',
                'Endpoint': {
                    'CommunicationStyle': 'TentaclePassive',
                    'Uri': 'https://web-1.example:10955/',
                    'Thumbprint': keys['agent'].thumbprint,
                    'ProxyId': 'Proxies-1',
                },
            },
        )
    ]


def test_a_registration_by_defaults(machine, settings, octopus):
    machine.does(
        *['register-with', '--server', octopus.url, '--apiKey', API_KEY],
        *['--environment=Environments-2', '--role=r', '--space', '', '--policy', ''],
    )
    posted = octopus.changes[0][2]
    assert posted['Name'].lower() == socket.gethostname().lower()
    assert posted['EnvironmentIds'] == ['Environments-2']
    host = urllib.parse.urlsplit(posted['Endpoint']['Uri'])
    assert (host.hostname, host.port) == (socket.gethostname().lower(), 10933)


POLLING_URI = r'poll://[a-z0-9]{20}/\Z'


def test_a_polling_target_is_registered(machine, settings, octopus, keys, tmp_path):
    with polled(tmp_path, keys) as server:
        machine.does(
            *registering(octopus, '--comms-style', 'TentacleActive'),
            *['--server-comms-port', str(server.port)],
        )
        address = 'https://127.0.0.1:%d' % server.port
    ((method, path, posted),) = octopus.changes
    assert (method, path) == ('POST', '/api/Spaces-1/machines')
    subscription = posted['Endpoint'].pop('Uri')
    assert re.match(POLLING_URI, subscription)
    assert posted['Endpoint'] == {
        'CommunicationStyle': 'TentacleActive',
        'Thumbprint': keys['agent'].thumbprint,
    }
    server = trusted_in(settings)[-1]
    assert server.pop('Address').rstrip('/') == address
    expected = trusted_server(keys['server'].thumbprint, 2, None, subscription)
    del expected['Address']
    assert server == expected
    assert 'Tentacle.Communication.PollingConnectionCount' not in settings_of(settings)


@pytest.mark.parametrize('configured', [None, '2'])
def test_a_polling_worker_is_registered(machine, settings, octopus, keys, tmp_path, configured):
    key = 'Tentacle.Communication.PollingConnectionCount'
    if configured:
        machine.does('set-polling-connection-count', '--pollingConnectionCount', configured)
    with polled(tmp_path, keys) as server:
        machine.does(
            *registering(octopus, '--comms-style=TentacleActive', command='register-worker'),
            *['--server-comms-address', 'https://127.0.0.1:%d' % server.port],
            *['--server-subscription-id', 'poll://mine/', '--workerpool', 'WorkerPools-2'],
        )
    ((method, path, posted),) = octopus.changes
    assert (method, path) == ('POST', '/api/Spaces-1/workers')
    assert posted.pop('MachinePolicyId', None) is None
    assert posted == {
        'Name': 'web-1',
        'WorkerPoolIds': ['WorkerPools-1', 'WorkerPools-2'],
        'Endpoint': {
            'CommunicationStyle': 'TentacleActive',
            'Uri': 'poll://mine/',
            'Thumbprint': keys['agent'].thumbprint,
        },
    }
    assert trusted_in(settings)[-1]['SubscriptionId'] == 'poll://mine/'
    assert settings_of(settings)[key] == (configured or str(max(5, os.cpu_count())))


@pytest.mark.parametrize('command', ['register-with', 'register-worker'])
def test_a_machine_that_exists_is_changed_by_force_alone(machine, settings, octopus, command):
    octopus.lists['machines'].append({'Name': 'other', 'Links': {'Self': '/x'}})
    octopus.lists['workers'].append({'Name': 'other', 'Links': {'Self': '/x'}})
    machine.does(*registering(octopus, command=command))
    (_, path, posted), before = octopus.changes.pop(), open_bytes(settings)
    line = machine.refuses(*registering(octopus, command=command))
    assert 'web-1' in line and 'force' in line
    assert octopus.changes == []
    octopus.lists['machines' if 'with' in command else 'workers'][-1]['IsDisabled'] = True
    machine.does(*registering(octopus, '--force', '--tentacle-comms-port=1', command=command))
    ((method, changed_path, sent),) = octopus.changes
    assert (method, changed_path.rpartition('/')[0]) == ('PUT', path)
    assert sent['IsDisabled'] is True  # the rest is sent as it came
    assert sent['Endpoint'] == dict(posted['Endpoint'], Uri='https://web-1.example:1/')
    assert open_bytes(settings) == before


def test_force_keeps_the_subscription(machine, settings, octopus, keys, tmp_path):
    with polled(tmp_path, keys) as server:
        words = ['--comms-style=TentacleActive', '--server-comms-port', str(server.port), '--force']
        for _ in range(2):
            machine.does(*registering(octopus, *words))
    first, second = [sent['Endpoint'] for _, _, sent in octopus.changes]
    assert [method for method, _, _ in octopus.changes] == ['POST', 'PUT']
    assert first == second
    assert len(trusted_in(settings)) == 2


@pytest.mark.parametrize(
    'words, named',
    [
        (['--env', 'Nowhere'], 'Nowhere'),
        (['--tenant', 'Nobody'], 'Nobody'),
        (['--tenanttag', 'Region/Mars'], 'Region/Mars'),
        (['--policy', 'No Policy'], 'No Policy'),
        (['--proxy', 'No Proxy'], 'No Proxy'),
        (['--space', 'Outer'], 'Outer'),
        (['--apiKey', 'API-WRONG'], 'You must be logged in'),
    ],
)
def test_what_the_server_does_not_have_is_named(machine, settings, octopus, words, named):
    before = open_bytes(settings)
    line = machine.refuses(*registering(octopus, *words))
    assert named in line and 'API-' not in line
    assert octopus.changes == [] and open_bytes(settings) == before


def test_a_worker_pool_that_is_not_there(machine, settings, octopus):
    line = registering(octopus, '--workerpool', 'Deep End', command='register-worker')
    assert 'Deep End' in machine.refuses(*line)
    assert octopus.changes == []


def test_nothing_is_kept_when_the_server_refuses(machine, settings, octopus, keys, tmp_path):
    octopus.refusal = (
        400,
        {
            'ErrorMessage': 'There was a problem with your request.',
            'Errors': ['The name is\ntaken', 'The role is odd'],
        },
    )
    before = open_bytes(settings)
    with polled(tmp_path, keys) as server:
        for words in ([], ['--comms-style=TentacleActive', '--server-comms-port=%d' % server.port]):
            line = machine.refuses(*registering(octopus, *words))
            assert 'There was a problem with your request.' in line
            assert 'taken' in line and 'The role is odd' in line
            assert open_bytes(settings) == before


def test_a_server_that_can_not_be_polled(machine, settings, octopus, secure_octopus):
    before = open_bytes(settings)
    with socket.create_server(('127.0.0.1', 0)) as place:
        closed = place.getsockname()[1]
    secure_octopus.front_page = 503
    for port, named in ((closed, '127.0.0.1:%d' % closed), (secure_octopus.port, '503')):
        words = ['--comms-style=TentacleActive', '--server-comms-port', str(port)]
        assert named in machine.refuses(*registering(octopus, *words))
    assert octopus.changes == [] and open_bytes(settings) == before


@pytest.mark.parametrize(
    'answer',
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>',
        b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]',
        b'HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n',
        b'SSH-2.0\r\n',
        b'',
    ],
    ids=['no JSON', 'no document', 'bad gateway', 'no HTTP', 'nothing'],
)
def test_what_is_no_octopus_server(machine, settings, answer):
    def serve(sock):
        sock.recv(65536)
        sock.sendall(answer)

    port, thread = answering(serve)
    line = ['register-with', '--server', 'http://127.0.0.1:%d' % port, '--apiKey', API_KEY]
    machine.refuses(*line, '--env', 'Test', '--role', 'r')
    thread.join()


def test_an_old_server_without_spaces(machine, settings, octopus):
    octopus.spaces = []
    machine.does(*registering(octopus))
    assert octopus.changes[0][:2] == ('POST', '/api/machines')


def test_a_server_below_a_path(machine, settings, octopus):
    answer = octopus.answer
    octopus.answer = lambda method, path, *rest: (
        answer(method, path[8:], *rest) if path[:8] == '/octopus' else (404, {})
    )
    octopus.url += '/octopus/'
    machine.does(*registering(octopus))
    assert octopus.changes[0][:2] == ('POST', '/api/Spaces-1/machines')


def test_the_api_key_need_not_stand_on_the_command_line(machine, settings, octopus, tmp_path):
    (tmp_path / 'key').write_text(API_KEY + '\n')
    machine.does(*registering(octopus, '--apiKey-file', str(tmp_path / 'key'), key=None))
    machine.does(*registering(octopus, name='web-2', key=None), OCTOPUS_API_KEY=API_KEY)
    assert len(octopus.changes) == 2


def test_the_api_key_goes_to_nobody_else(machine, settings, octopus):
    def point_elsewhere(sock):
        sock.recv(65536)
        location = octopus.url + '/api'
        sock.sendall(b'HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n' % location.encode())

    port, thread = answering(point_elsewhere)
    line = ['register-with', '--server', 'http://127.0.0.1:%d' % port, '--apiKey', API_KEY]
    machine.refuses(*line, '--env', 'Test', '--role', 'r')
    thread.join()
    assert API_KEY not in octopus.keys and octopus.changes == []


def test_secrets_do_not_stand_in_the_log(machine, settings, octopus, keys):
    machine.does(*registering(octopus))
    machine.does('polling-proxy', '--proxyEnable=True', '--proxyHost=p', '--proxyPassword=geheim')
    machine.refuses('import-certificate', '--from-file=/missing', '/pfx-password=geheim')
    log = logged(settings)
    assert 'register-with' in log and 'Web-1.example' in log
    assert API_KEY not in log and 'geheim' not in log


def test_who_stands_between_at_the_polled_port_is_not_trusted(machine, settings, keys, tmp_path):
    """The server's own word, over the web, counts; without it nothing is registered."""
    before = open_bytes(settings)
    with contextlib.closing(OctopusServer('A' * 40)) as octopus, polled(tmp_path, keys) as server:
        words = registering(octopus, '--comms-style', 'TentacleActive')
        words += ['--server-comms-port', str(server.port)]
        assert 'somebody may stand between' in machine.refuses(*words)
        answer = octopus.answer

        def fails(method, path, key, sent):
            is_asked = path.endswith('certificate-global')
            return (502, {}) if is_asked else answer(method, path, key, sent)

        octopus.answer = fails
        assert '502' in machine.refuses(*words)
        assert octopus.changes == []
    assert open_bytes(settings) == before


def test_a_pin_without_tls_is_refused(machine, settings, octopus):
    words = registering(octopus, '--server-thumbprint', 'A' * 40)
    assert 'https://' in machine.refuses(*words)
    assert octopus.seen == []


@pytest.mark.parametrize(
    'status, body',
    [
        (200, b'[' * 100000),
        (400, b'{"Errors": 5}'),
        (400, b'[' * 100000),
        (200, b'{"Links": {"Spaces": 1}, "Version": []}'),
    ],
)
def test_odd_answers_of_a_server_are_told_in_a_line(machine, settings, status, body):
    with socket.create_server(('127.0.0.1', 0)) as server:
        url = 'http://127.0.0.1:%d' % server.getsockname()[1]

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = server.accept()
                    with sock:
                        sock.settimeout(5)
                        sock.recv(65536)
                        head = 'HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n'
                        sock.sendall((head % (status, len(body))).encode() + body)

        thread = threading.Thread(target=answer)
        thread.start()
        words = '--apiKey %s --env Test --role r' % API_KEY
        machine.refuses('register-with', '--server', url, *words.split())
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    'words, hidden',
    [
        (['-p', 's3cret'], 's3cret'),
        (['/p=s3cret'], 's3cret'),
        (['--app', '/token', '--pfx-password', 's3cret'], 's3cret'),
        (['--proxyPassword:s3cret'], 's3cret'),
        (['--apiKey', '--s3cret'], 's3cret'),
        (['--server', 'https://bob:s3cret@host/'], 's3cret'),
    ],
)
def test_secrets_on_a_command_line_are_not_shown(words, hidden):
    shown = tentacle._shown_words(words)
    assert hidden not in shown and '***' in shown
    assert tentacle._shown_words(['--name', 'x', '--port=1']) == '--name x --port=1'


def test_the_server_must_show_who_it_is(machine, settings, secure_octopus, keys):
    ours, before = secure_octopus, open_bytes(settings)
    line = machine.refuses(*registering(ours))
    assert '--server-thumbprint' in line and keys['octopus'].thumbprint in line
    line = machine.refuses(*registering(ours, '--server-thumbprint', A_THUMBPRINT))
    assert keys['octopus'].thumbprint in line
    assert ours.seen == [] and open_bytes(settings) == before  # nor has it our API key
    machine.does(*registering(ours, '--server-thumbprint', keys['octopus'].thumbprint))
    machine.does(*registering(ours, '--insecure', '--force'))
    assert [method for method, _, _ in ours.changes] == ['POST', 'PUT']


@needs_openssl
def test_a_server_that_the_system_trusts(machine, settings, keys):
    subject = ['-subj', '/CN=x', '-addext', 'subjectAltName=IP:127.0.0.1']
    identity = keys.special('by address', *subject)
    octopus = OctopusServer(keys['server'].thumbprint, identity)
    try:
        machine.does(*registering(octopus), SSL_CERT_FILE=identity.path + '.crt')
        assert len(octopus.changes) == 1
    finally:
        octopus.close()


def test_a_polling_one_registers_through_the_polling_proxy(machine, settings, octopus):
    with socket.create_server(('127.0.0.1', 0)) as place:
        proxy = '127.0.0.1:%d' % place.getsockname()[1]
    host, port = proxy.split(':')
    words = ['--proxyEnable=True', '--proxyHost', host, '--proxyPort', port]
    machine.does('polling-proxy', *words)
    line = machine.refuses(*registering(octopus, '--comms-style=TentacleActive'))
    assert 'proxy' in line.lower() and octopus.seen == []
    machine.does(*registering(octopus))  # a listening one does not


def test_poll_server(machine, octopus, keys, tmp_path):
    thumbprint = keys['server'].thumbprint
    first = trusted_server(thumbprint, 2, 'https://first:10943/', 'poll://ours/')
    settings = machine.add(
        identity=keys['agent'], Tentacle__Communication__TrustedOctopusServers=compact([first])
    )
    with polled(tmp_path, keys) as server:
        port = str(server.port)
        words = ['poll-server', '--server', octopus.url, '--server-comms-port', port]
        machine.does(*words, '--apiKey', API_KEY)
        address = 'https://127.0.0.1:' + port
        kept = trusted_in(settings)
        assert kept[0] == first
        assert kept[1].pop('Address').rstrip('/') == address
        assert (kept[1]['Thumbprint'], kept[1]['SubscriptionId']) == (thumbprint, 'poll://ours/')
        assert kept[1]['CommunicationStyle'] == 2
        octopus.seen.clear()
        words = ['poll-server', '--reuse-server-thumbprint', '--server', octopus.url]
        machine.does(*words, '--apiKey', API_KEY, '--server-comms-address', address)
        assert len(trusted_in(settings)) == 2
    assert octopus.changes == []


def test_poll_server_wants_a_server_that_is_trusted(machine, settings, octopus, keys, tmp_path):
    before = open_bytes(settings)
    with polled(tmp_path, keys) as server:
        words = ['poll-server', '--server', octopus.url, '--server-comms-port', str(server.port)]
        assert keys['server'].thumbprint in machine.refuses(*words, '--apiKey', API_KEY)
    assert open_bytes(settings) == before


@pytest.mark.parametrize(
    'command, collection',
    [('deregister-from', 'machines'), ('deregister-worker', 'workers')],
)
def test_deregistering(machine, settings, octopus, keys, command, collection):
    def known(number, name, thumbprint):
        path = '/api/Spaces-1/%s/%d' % (collection, number)
        endpoint = {'CommunicationStyle': 'TentaclePassive', 'Thumbprint': thumbprint}
        return {
            'Id': str(number),
            'Name': name,
            'Thumbprint': thumbprint,
            'Endpoint': endpoint,
            'Links': {'Self': path},
        }

    words = [command, '--server', octopus.url, '--apiKey', API_KEY]
    before, listed = open_bytes(settings), octopus.lists[collection]
    listed.append(known(1, 'other', A_THUMBPRINT))
    machine.refuses(*words)  # it is not registered there
    listed.append(known(2, 'web-1', keys['agent'].thumbprint))
    machine.does(*words)
    listed.append(known(3, 'web-1', keys['agent'].thumbprint))
    listed.append(known(4, 'web-2', keys['agent'].thumbprint))
    assert '--multiple' in machine.refuses(*words)
    assert 'Outer' in machine.refuses(*words, '--multiple', '--space', 'Outer')
    machine.does(*words, '--multiple', '--space', 'default')
    assert [(method, path) for method, path, _ in octopus.changes] == [
        ('DELETE', '/api/Spaces-1/%s/%d' % (collection, number)) for number in (2, 3, 4)
    ]
    assert [document['Name'] for document in listed] == ['other']
    assert open_bytes(settings) == before  # the server is still trusted


# ---- 19. Command line: the service ---------------------------------------------------------------

SYSTEMCTL = '''
import os, shlex, signal, socket, subprocess, sys, time

folder, units, path = %r, %r, %r
with open(os.path.join(folder, 'systemctl.log'), 'a') as log:
    log.write(' '.join(sys.argv[1:]) + '\\n')
words = [word for word in sys.argv[1:] if not word.startswith('-')]
verb, names = (words[0] if words else ''), words[1:]
if '--user' in sys.argv:
    units = os.path.join(os.environ['HOME'], '.config', 'systemd', 'user')


def is_there(pid):
    try:
        with open('/proc/%%d/stat' %% pid) as file:
            return file.read().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError:
        return False


def pid_of(name):
    try:
        with open(os.path.join(folder, name + '.pid')) as file:
            return int(file.read())
    except OSError:
        return None


def stop(name):
    pid = pid_of(name)
    if pid is None:
        return
    if is_there(pid):
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 20
        while is_there(pid):
            if time.monotonic() > end:
                sys.exit('%%s does not end' %% name)
            time.sleep(0.01)
    os.unlink(os.path.join(folder, name + '.pid'))


def start(name):
    if pid_of(name) and is_there(pid_of(name)):
        return
    environment = {'PATH': path, 'HOME': '/', 'LANG': 'C.UTF-8'}
    with open(os.path.join(units, name + '.service')) as file:
        for line in file:
            key, _, value = line.strip().partition('=')
            value = value.replace('%%%%', '%%')
            if key == 'Environment':
                environment.update(word.split('=', 1) for word in shlex.split(value))
            elif key == 'ExecStart':
                command = shlex.split(value.replace('$$', '$'))
    place = os.path.join(folder, 'n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(place)
        environment['NOTIFY_SOCKET'] = place
        with open(os.path.join(folder, name + '.out'), 'ab') as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
                cwd='/', start_new_session=True,
            )
        with open(os.path.join(folder, name + '.pid'), 'w') as file:
            file.write(str(process.pid))
        notified.settimeout(30)
        try:
            while b'READY=1' not in notified.recv(4096).splitlines():
                pass
        except OSError:
            sys.exit('%%s does not get ready' %% name)
        finally:
            os.unlink(place)


for name in names:
    name = name[:-8] if name.endswith('.service') else name
    unit = os.path.join(units, name + '.service')
    if verb in ('start', 'restart', 'enable') and not os.path.exists(unit):
        sys.stderr.write('Unit %%s.service not found.\\n' %% name)
        sys.exit(5)
    if verb in ('stop', 'restart') or '--now' in sys.argv and verb == 'disable':
        stop(name)
    if verb in ('start', 'restart') or '--now' in sys.argv and verb == 'enable':
        start(name)
    if verb in ('is-active', 'status') and not (pid_of(name) and is_there(pid_of(name))):
        sys.exit(3)
'''


class Installed:
    """A machine with `Tentacle` and a stand-in for `systemctl` on its PATH. `shell(text)` runs a
    script that must succeed, and gives its stdout; `calls()`: what systemctl was asked for.
    """

    def __init__(self, machine):
        self.machine = machine
        machine.patches = 'os.geteuid = lambda: 0'
        self.bin = os.path.join(machine.folder, 'bin')
        self.path = self.bin + os.pathsep + os.environ['PATH']
        os.mkdir(self.bin)
        systemctl = SYSTEMCTL % (machine.folder, machine.units, self.path)
        for name, code in (('Tentacle', machine.code), ('systemctl', systemctl)):
            script = os.path.join(self.bin, name)
            words = [sys.executable, '-c', code]
            with open(script, 'w') as file:
                file.write('#!/bin/sh\nexec %s "$@"\n' % ' '.join(map(shlex.quote, words)))
            os.chmod(script, 0o755)

    def run(self, *arguments, **environment):
        return self.machine.run(*arguments, PATH=self.path, **environment)

    def shell(self, text):
        done = subprocess.run(
            ['sh', '-e', '-c', text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=120,
            cwd=self.machine.folder,
            env=self.machine.environment(PATH=self.path),
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout.decode()

    def calls(self):
        return open_bytes(os.path.join(self.machine.folder, 'systemctl.log')).decode()

    def unit(self, name):
        return os.path.join(self.machine.units, name + '.service')

    def close(self):
        """Stop what still runs."""
        for name in os.listdir(self.machine.folder):
            if name.endswith('.pid'):
                command = [os.path.join(self.bin, 'systemctl'), 'stop', name[:-4]]
                subprocess.run(command, check=True)


@pytest.fixture
def installed_machine(machine):
    there = Installed(machine)
    yield there
    there.close()


def unit_lines(path):
    """(section, key, value) of a unit."""
    section, lines = '', set()
    for line in open_bytes(path).decode().splitlines():
        if line.startswith('['):
            section = line
        elif '=' in line and not line.startswith('#'):
            lines.add((section,) + tuple(line.split('=', 1)))
    return lines


def check_unit(path):
    lines = unit_lines(path)
    for key, value in (('Type', 'notify'), ('KillMode', 'process'), ('Restart', 'always')):
        assert ('[Service]', key, value) in lines
    if shutil.which('systemd-analyze'):
        done = subprocess.run(
            ['systemd-analyze', 'verify', path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        remarks = [line for line in done.stdout.splitlines() if path.encode() in line]
        assert (done.returncode, remarks) == (0, [])


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as place:
        return place.getsockname()[1]


LISTENING_INSTALL = '''
Tentacle create-instance --config {folder}/default/tentacle-default.config
Tentacle new-certificate --if-blank
Tentacle configure --port {port} --noListen False --reset-trust --app {folder}/Applications/
Tentacle configure --trust {thumbprint}
Tentacle register-with --server {url} --apiKey {key} --space Default --name web-1 --env Test \
  --role web-server
Tentacle service --install --start
'''

POLLING_INSTALL = '''
Tentacle create-instance --instance "Tentacle" --config "{folder}/t/tentacle.config"
Tentacle new-certificate --instance "Tentacle" --if-blank
Tentacle configure --instance "Tentacle" --app "{folder}/Applications" --noListen "True" \
  --reset-trust
Tentacle register-with --instance "Tentacle" --server "{url}" --name "web-1" \
  --comms-style "TentacleActive" --server-comms-port "{port}" --apiKey "{key}" --space "Default" \
  --environment "Test" --role "web-server"
Tentacle service --install --start --instance "Tentacle"
'''

WORKER_INSTALL = '''
Tentacle create-instance --instance "My Worker" --config "{folder}/w/tentacle.config"
Tentacle new-certificate --instance "My Worker" --if-blank
Tentacle configure --instance "My Worker" --app "{folder}/Applications" --noListen "True" \
  --reset-trust
Tentacle register-worker --instance "My Worker" --server "{url}" --name "worker-1" \
  --comms-style "TentacleActive" --server-comms-port "{port}" --apiKey "{key}" --space "Default" \
  --workerpool "Default Worker Pool"
Tentacle service --install --start --instance "My Worker"
'''


@pytest.fixture
def operator(tmp_path, keys):
    """The home of a dispatcher that is `keys['server']`."""
    home = str(tmp_path / 'operator')
    os.makedirs(home, 0o700)
    shutil.copy(keys['server'].path, os.path.join(home, 'tentacle.pem'))
    return home


def install(there, text, octopus, port, keys):
    """Run an install script; the machine or worker as it was posted."""
    facts = {'folder': there.machine.folder, 'url': octopus.url, 'key': API_KEY, 'port': port}
    out = there.shell(text.format(thumbprint=keys['server'].thumbprint, **facts))
    assert 'Service installed' in out and 'Service started' in out
    ((method, _, posted),) = octopus.changes
    assert method == 'POST'
    return posted


def test_the_documented_install_of_a_listening_target(installed_machine, octopus, keys, operator):
    port = free_port()
    posted = install(installed_machine, LISTENING_INSTALL, octopus, port, keys)
    assert (posted['Name'], posted['Roles']) == ('web-1', ['web-server'])
    assert posted['EnvironmentIds'] == ['Environments-1']
    assert posted['Endpoint']['CommunicationStyle'] == 'TentaclePassive'
    assert urllib.parse.urlsplit(posted['Endpoint']['Uri']).port == port
    check_unit(installed_machine.unit('Tentacle'))
    assert ('[Install]', 'WantedBy', 'multi-user.target') in unit_lines(
        installed_machine.unit('Tentacle')
    )
    assert 'daemon-reload' in installed_machine.calls()
    assert re.search(r'enable .*Tentacle', installed_machine.calls())
    target = '127.0.0.1:%d' % port
    endpoint = tentacle.ServiceEndPoint('https://%s/' % target, posted['Endpoint']['Thumbprint'])
    tentacle.Targets(operator).pin(target, endpoint)
    words = ['echo "$TentacleVersion $TentacleInstanceName $TentacleApplications"; exit 3']
    code, out, err = cli('exec', target, '--', *words, home=operator)
    applications = installed_machine.machine.folder + '/Applications/'
    expected = '%s Tentacle %s' % (tentacle.TENTACLE_VERSION, applications)
    assert (code, out.rstrip('/\n'), err) == (3, expected.rstrip('/'), '')

    # A script may restart the service that runs it.
    words = ['exec', target, '--', 'Tentacle service --stop --start; echo restarted']
    pid = open_bytes(os.path.join(installed_machine.machine.folder, 'Tentacle.pid'))
    code, out, err = cli(*words, home=operator)
    assert code == 0, err
    assert 'Stopping service' in out and out.endswith('restarted\n')
    assert open_bytes(os.path.join(installed_machine.machine.folder, 'Tentacle.pid')) != pid

    out = installed_machine.shell('Tentacle service --stop --uninstall')
    assert 'Stopping service' in out
    assert not os.path.exists(installed_machine.unit('Tentacle'))
    assert re.search(r'disable .*Tentacle', installed_machine.calls())
    with pytest.raises(OSError):
        socket.create_connection(('127.0.0.1', port)).close()


@pytest.mark.parametrize(
    'text, unit',
    [(POLLING_INSTALL, 'Tentacle'), (WORKER_INSTALL, 'My-Worker')],
    ids=['target', 'worker'],
)
def test_the_documented_install_of_polling_ones(
    installed_machine, octopus, keys, operator, text, unit
):
    there = installed_machine
    with serving(operator) as port:
        posted = install(there, text, octopus, port, keys)
        subscription, thumbprint = posted['Endpoint']['Uri'], posted['Endpoint']['Thumbprint']
        assert re.match(POLLING_URI, subscription)
        check_unit(there.unit(unit))
        assert cli('trust', subscription, thumbprint, home=operator)[0] == 0
        code, out, err = cli('exec', subscription, '--', 'echo hi; exit 3', home=operator)
        assert (code, out) == (3, 'hi\n'), err
        there.shell('Tentacle service --stop --uninstall --instance "%s"' % unit.replace('-', ' '))
        assert not os.path.exists(there.unit(unit))


def test_an_install_that_is_run_again(installed_machine, octopus, keys):
    port = free_port()
    posted = install(installed_machine, LISTENING_INSTALL, octopus, port, keys)
    octopus.changes.clear()
    again = LISTENING_INSTALL.replace('register-with', 'register-with --force')
    facts = {'folder': installed_machine.machine.folder, 'url': octopus.url, 'key': API_KEY}
    thumbprint = keys['server'].thumbprint
    installed_machine.shell(again.format(thumbprint=thumbprint, port=port, **facts))
    ((method, _, sent),) = octopus.changes
    assert method == 'PUT' and sent['Endpoint'] == posted['Endpoint']


def test_service_without_systemd(machine, settings, tmp_path):
    line = machine.refuses('service', '--install', '--start', PATH=str(tmp_path))
    assert 'cron' in line and '@reboot' in line and 'tentacle.py' in line
    assert os.listdir(machine.units) == []


def test_a_service_of_a_user(installed_machine, settings):
    machine = installed_machine.machine
    machine.patches = 'os.geteuid = os.getuid = lambda: 1000'
    code, out, err = installed_machine.run('service', '--install')
    assert code == 0, err
    assert os.listdir(machine.units) == []
    unit = os.path.join(machine.folder, '.config', 'systemd', 'user', 'Tentacle.service')
    check_unit(unit)
    lines = unit_lines(unit)
    assert ('[Install]', 'WantedBy', 'default.target') in lines
    assert 'User' not in {key for _, key, _ in lines}
    calls = installed_machine.calls().splitlines()
    assert calls and all('--user' in call.split() for call in calls)
    installed_machine.machine.does('service', '--uninstall', PATH=installed_machine.path)
    assert not os.path.exists(unit)


def test_a_service_that_runs_as_somebody(installed_machine, settings):
    installed_machine.machine.does(
        'service', '--install', '--username', 'nobody', PATH=installed_machine.path
    )
    unit = installed_machine.unit('Tentacle')
    assert ('[Service]', 'User', 'nobody') in unit_lines(unit)
    assert stat.S_IMODE(os.stat(unit).st_mode) == 0o644


@pytest.mark.parametrize('option', ['--start', '--restart'])
def test_a_service_that_is_not_installed(installed_machine, settings, option):
    code, out, err = installed_machine.run('service', option)
    assert (code, err.count(b'\n')) == (1, 1) and b'Tentacle' in err
    assert b'Service started' not in out and b'has been restarted' not in out


def test_a_service_without_a_named_instance(installed_machine, keys):
    """Its unit names the settings; where there are none, there is no service."""
    home = os.path.join(installed_machine.machine.folder, 'home of "mine" 5%')
    code, out, err = installed_machine.run('service', '--install', '--home', home)
    assert (code, out) == (1, b'') and b'create-instance' in err
    assert installed_machine.run('configure', '--home', home, '--trust', A_THUMBPRINT)[0] == 0
    assert installed_machine.run('service', '--install', '--home', home)[0] == 0
    unit = installed_machine.unit('OctopusDeploy-Tentacle')
    quoted = home.replace('"', '\\"').replace('%', '%%')
    text = '"--config" "%s/tentacle-default.config"' % quoted
    assert text in open_bytes(unit).decode()
    check_unit(unit)


def test_a_service_keeps_its_user(installed_machine, settings):
    """That of the unit that is there, also the original's."""
    with open(installed_machine.unit('Tentacle'), 'w') as file:
        file.write('[Service]\nUser=nobody-at-all\nExecStart=/opt/octopus/tentacle/Tentacle run\n')
    code, out, err = installed_machine.run('service', '--install')
    assert (code, out) == (1, b'') and b'nobody-at-all: there is no such user' in err


def test_reconfigure_writes_the_unit_anew(installed_machine, settings):
    installed_machine.shell('Tentacle service --install')
    unit = installed_machine.unit('Tentacle')
    before = open_bytes(unit)
    with open(unit, 'a') as file:
        file.write('# changed\n')
    installed_machine.shell('Tentacle service --reconfigure')
    assert open_bytes(unit) == before


# ---- 19. Command line: agent ---------------------------------------------------------------------


def log_path(settings):
    return os.path.join(os.path.dirname(settings), 'Logs', 'OctopusTentacle.txt')


def logged(settings):
    return open_bytes(log_path(settings)).decode()


class RunningAgent:
    """`tentacle.py agent` as a process. `text()`: its stdout, `port`: where it listens."""

    def __init__(self, machine, *words, **environment):
        self._out = os.path.join(machine.folder, 'agent.out')
        with open(self._out, 'wb') as out, open(self._out + '.err', 'wb') as err:
            self.process = subprocess.Popen(
                [sys.executable, '-c', machine.code] + (list(words) or ['agent']),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=machine.folder,
                env=machine.environment(**environment),
            )

    def text(self):
        return open_bytes(self._out).decode()

    def errors(self):
        return open_bytes(self._out + '.err').decode()

    @property
    def port(self):
        return int(re.search(r'^listen://.+:(\d+)/.*Listener started$', self.text(), re.M).group(1))


@contextlib.contextmanager
def running_agent(machine, *words, until='Agent listening on: ', **environment):
    agent = RunningAgent(machine, *(words or ('agent', '--noninteractive')), **environment)
    try:
        eventually(lambda: until in agent.text() or agent.process.poll() is not None, 20)
        assert until in agent.text(), agent.errors()
        yield agent
    finally:
        agent.process.terminate()
        assert agent.process.wait(20) == 0


def agent_instance(machine, keys, *servers, **values):
    """The settings of an agent on a free port that trusts these."""
    listed = [server if isinstance(server, dict) else trusted_server(server) for server in servers]
    values.setdefault('Tentacle__Services__PortNumber', '0')
    return machine.add(
        identity=keys['agent'],
        Tentacle__Communication__TrustedOctopusServers=compact(listed),
        **values,
    )


def change_servers_from_outside(settings, *thumbprints, **values):
    """Another program writes who is trusted."""
    changed = settings_of(settings)
    changed[TRUSTED] = compact([trusted_server(thumbprint) for thumbprint in thumbprints])
    changed.update({key.replace('__', '.'): text for key, text in values.items()})
    write_settings(settings, changed)


@pytest.mark.parametrize('word', ['agent', 'run'])
def test_what_a_listening_agent_says(machine, keys, word):
    settings = agent_instance(machine, keys, A_THUMBPRINT, keys['server'].thumbprint)
    with running_agent(machine, word, '--instance=Tentacle', '--noninteractive') as agent:
        lines = agent.text().splitlines()
        trust = 'Agent will trust Octopus Servers with the thumbprint: '
        assert sorted(lines[:2]) == sorted(
            [trust + A_THUMBPRINT, trust + keys['server'].thumbprint]
        )
        assert re.match(r'listen://\S+:%d/ .*Listener started\Z' % agent.port, lines[2])
        assert re.match(r'Agent listening on: \S+:\d+\Z', lines[3])
        assert len(lines) == 4
        eventually(lambda: all(line in logged(settings) for line in lines))
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            assert client.run_script('exit 7', print) == 7


def test_start_up_facts_stand_in_the_log_alone(machine, keys):
    settings = agent_instance(machine, keys)
    facts = [
        'OperatingSystem: ',
        'OsBitVersion: ',
        'Is64BitProcess: ',
        'CurrentUser: ',
        'MachineName: ' + socket.gethostname(),
        'ProcessorCount: %d' % os.cpu_count(),
        'CurrentDirectory: ' + machine.folder,
        'TempDirectory: ',
        'HostProcessName: ',
        'PID: ',
        'CommandLine: ',
    ]
    with running_agent(machine, 'agent', '--noninteractive') as agent:
        first = open_bytes(log_path(settings))
        assert [fact for fact in facts if fact not in first.decode()] == []
        assert [fact for fact in facts if fact in agent.text()] == []
        assert 'PID: %d' % agent.process.pid in first.decode()
        code, out, err = machine.run('show-thumbprint', '--instance', 'Tentacle')
        assert (code, out.decode(), err) == (0, keys['agent'].thumbprint, b'')
        then = open_bytes(log_path(settings))
    assert then.startswith(first)
    assert [fact for fact in facts if fact not in then[len(first) :].decode()] == []
    assert 'show-thumbprint' in then[len(first) :].decode()


@pytest.mark.parametrize(
    'count, environment, said',
    [(None, {}, 1), ('2', {}, 2), ('2', {'TentaclePollingConnectionCount': '3'}, 3)],
)
def test_what_a_polling_agent_says(machine, keys, tmp_path, count, environment, said):
    with polled(tmp_path, keys) as server:
        address = 'https://127.0.0.1:%d' % server.port
        thumbprint = keys['server'].thumbprint
        settings = agent_instance(
            machine,
            keys,
            trusted_server(thumbprint, 2, address, 'poll://one/'),
            Tentacle__Services__NoListen='True',
            **({'Tentacle__Communication__PollingConnectionCount': count} if count else {}),
        )
        until = 'Starting %d polling connections' % said
        with running_agent(machine, until=until, **environment) as agent:
            eventually(lambda: 'Agent will not listen on any TCP ports' in agent.text())
            lines = agent.text().splitlines()
            assert re.match(
                r'Agent will poll Octopus Server at %s/? for subscription poll://one/ '
                r'expecting thumbprint %s\Z' % (re.escape(address), thumbprint),
                [line for line in lines if 'will poll' in line][0],
            )
            assert until in lines and 'Agent will not listen on any TCP ports' in lines
            assert not [line for line in lines if 'listen://' in line]
            eventually(lambda: all(line in logged(settings) for line in lines))
            eventually(lambda: len(server.connections()) == said)
            with server.client(ONE) as client:
                assert client.run_script('exit 7', print) == 7
            change_servers_from_outside(settings)  # trusted no more
            eventually(lambda: not server.connections(), 6)


def test_an_agent_listens_and_polls_at_once(machine, keys, tmp_path):
    with polled(tmp_path, keys) as server:
        address = 'https://127.0.0.1:%d/' % server.port
        polling_one = trusted_server(keys['server'].thumbprint, 2, address, 'poll://one/')
        agent_instance(machine, keys, polling_one, keys['other'].thumbprint)
        with running_agent(machine) as agent:
            eventually(lambda: server.connections())
            with Peer(agent.port, keys['other']):
                assert 'Starting 1 polling connections' in agent.text()


def test_trust_that_changes_while_an_agent_runs(machine, keys):
    settings = agent_instance(machine, keys, keys['server'].thumbprint, keys['other'].thumbprint)
    question = request_bytes('ICapabilitiesServiceV2', 'GetCapabilities')
    with running_agent(machine) as agent:
        with Peer(agent.port, keys['server']) as one, Peer(agent.port, keys['other']) as two:
            two.call(question)
            two.go_on()
            begun = time.monotonic()
            change_servers_from_outside(
                settings, keys['other'].thumbprint, keys['third'].thumbprint
            )
            assert one.is_hung_up_on()
            assert time.monotonic() < begun + 6
            assert two.call(question)['error'] is None
            with Peer(agent.port, keys['third']):
                pass
            machine.does('configure', '--remove-trust', keys['other'].thumbprint)
            two.go_on()
            assert two.is_hung_up_on()


def test_keys_that_another_program_removes_while_an_agent_runs(machine, keys):
    settings = agent_instance(machine, keys, keys['server'].thumbprint)
    with running_agent(machine) as agent:
        with Peer(agent.port, keys['server']) as peer:
            write_settings(settings, {'Octopus.Home': os.path.dirname(settings)})
            assert peer.is_hung_up_on()
        change_servers_from_outside(settings, keys['server'].thumbprint)
        with Peer(agent.port, keys['server']) as peer:
            shown = hashlib.sha1(peer.sock.getpeercert(True)).hexdigest().upper()
        assert shown == keys['agent'].thumbprint
        assert TRUSTED in settings_of(settings)


def test_trust_that_ends_between_handshake_and_greeting(tmp_path, keys):
    trusted, asked = {keys['server'].thumbprint}, []

    def trusts():
        asked.append(1)
        return frozenset(trusted)

    services = tentacle.AgentServices(str(tmp_path), limits=LIMITS)
    agent = tentacle.ListeningTentacle(services, keys['agent'], trusts, port=0)
    agent.start()
    try:
        with contextlib.closing(dial(agent.port, keys['server'], TLS_1_2)) as sock:
            eventually(lambda: len(asked) >= 3)  # for its handshake, and after it
            trusted.clear()
            with contextlib.suppress(OSError):
                sock.sendall(b'MX\n\nMX-CLIENT 1.0\r\n\r\n')
            assert received(sock) == b''
    finally:
        agent.stop()
        services.stop()


def test_changes_that_need_a_restart_are_said(machine, keys):
    settings = agent_instance(machine, keys, A_THUMBPRINT)
    with running_agent(machine) as agent:
        change_servers_from_outside(settings, A_THUMBPRINT, Tentacle__Services__ListenIP='::1')

        def is_said():
            text = agent.text() + agent.errors() + logged(settings)
            return re.search('ListenIP.*restart|restart.*ListenIP', text)

        eventually(is_said)
        assert settings_of(settings)['Tentacle.Services.ListenIP'] == '::1'


def test_an_agent_outlives_settings_that_are_damaged(machine, keys):
    settings = agent_instance(machine, keys, keys['server'].thumbprint)
    with running_agent(machine) as agent, Peer(agent.port, keys['server']) as peer:
        with open(settings, 'ab') as file:
            file.write(b'<')
        eventually(lambda: 'damaged' in logged(settings))
        assert peer.call(request_bytes('ICapabilitiesServiceV2', 'GetCapabilities'))


def test_an_agent_without_a_certificate_makes_one(machine):
    settings = machine.add(Tentacle__Services__PortNumber='0')
    with running_agent(machine):
        thumbprint = machine.does('show-thumbprint')
    assert settings_of(settings)['Tentacle.CertificateThumbprint'] == thumbprint
    assert tentacle.load_identity(our_pem(settings)).thumbprint == thumbprint


def test_agent_waits_before_it_starts(machine, keys):
    agent_instance(machine, keys)
    begun = time.monotonic()
    with running_agent(machine, 'agent', '--wait', '700', '--noninteractive'):
        assert time.monotonic() > begun + 0.7


# ---- 19. Command line: audit ---------------------------------------------------------------------


def audit(settings):
    """The documents of the audit log, each as text to look into."""
    path = os.path.join(os.path.dirname(settings), 'Logs', 'audit.jsonl')
    lines = open_bytes(path).decode().splitlines() if os.path.exists(path) else []
    assert all(isinstance(json.loads(line), dict) for line in lines)
    return lines


def audited(settings, *facts):
    """Wait for a line with all of these."""
    return eventually(
        lambda: [
            line
            for line in audit(settings)
            if all(str(fact).lower() in line.lower() for fact in facts)
        ]
    )[0]


def test_audit(machine, keys, tmp_path):
    settings = agent_instance(machine, keys, keys['server'].thumbprint)
    body = 'echo geheim; exit 7'
    with running_agent(machine) as agent:
        with contextlib.suppress(OSError), dial(agent.port, keys['stranger']) as stranger:
            received(stranger)
        audited(settings, keys['stranger'].thumbprint, 'refused')
        endpoint = tentacle.ServiceEndPoint(
            'https://127.0.0.1:%d/' % agent.port, keys['agent'].thumbprint
        )
        with tentacle.TentacleClient(endpoint, keys['server']) as client:
            ticket = 'ticket-of-audit'
            v2(client, 'StartScript', start_command(body, ticket, task_id='ServerTasks-77'))
            finished(client, ticket)
            completed(client, ticket)
            path = str(tmp_path / 'a file')
            client.upload(io.BytesIO(b'geheim'), path)
            client.download(path, io.BytesIO())
        who = keys['server'].thumbprint
        audited(settings, who, 'accepted')
        started = audited(
            settings, ticket, 'ServerTasks-77', who, hashlib.sha256(body.encode()).hexdigest()
        )
        ended = audited(settings, ticket, '7', 'ended')
        assert 7 in json.loads(ended).values() and started != ended
        audited(settings, 'GetStatus', who)
        written = audited(settings, path, 'written')
        read = audited(settings, path, 'read')
        assert written != read
        text = '\n'.join(audit(settings))
        assert 'geheim' not in text
        log = logged(settings)
        assert 'geheim' not in log
    name = os.path.join(os.path.dirname(settings), 'Logs', 'audit.jsonl')
    assert stat.S_IMODE(os.stat(name).st_mode) & 0o077 == 0


def test_audit_of_a_polling_agent(machine, keys, tmp_path):
    with polled(tmp_path, keys) as server:
        address = 'https://127.0.0.1:%d/' % server.port
        one = trusted_server(keys['server'].thumbprint, 2, address, 'poll://one/')
        settings = agent_instance(machine, keys, one, Tentacle__Services__NoListen='true')
        with running_agent(machine, until='polling connections'):
            with server.client(ONE) as client:
                assert client.run_script('exit 7', print) == 7
            audited(settings, keys['server'].thumbprint, hashlib.sha256(b'exit 7').hexdigest())


def test_logs_are_rotated(machine, keys):
    settings = agent_instance(machine, keys)
    machine.patches = 'tentacle.LIMITS = tentacle.LIMITS._replace(log_file=5000)'
    names = {'audit.jsonl', 'audit.0.jsonl', 'OctopusTentacle.txt', 'OctopusTentacle.0.txt'}
    folder = os.path.dirname(log_path(settings))
    with running_agent(machine) as agent:
        for _ in range(100):
            with contextlib.suppress(OSError), dial(agent.port, keys['stranger']) as stranger:
                received(stranger)
            if names <= set(os.listdir(folder)):
                break
    assert names <= set(os.listdir(folder))
    for name in names:
        details = os.stat(os.path.join(folder, name))
        assert (stat.S_IMODE(details.st_mode), details.st_size < 6000) == (0o600, True)


# -- setup


def set_up(machine, *words, stdin=b''):
    """(exit code, stdout, stderr) of `setup` that installs no service."""
    done = subprocess.run(
        [sys.executable, PROGRAM, 'setup', '--no-service', *words],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=machine.environment(),
        cwd=machine.folder,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_setup_asks(machine):
    """A wrong answer is asked for again, an empty one is the default."""
    where, app = os.path.join(machine.folder, 'where'), os.path.join(machine.folder, 'apps')
    answers = ['', 'x', '1', where, app, '99999', '0', '', 'ABC', 'B' * 40, '']
    code, out, err = set_up(machine, stdin='\n'.join(answers).encode())
    assert code == 0, (out, err)
    assert 'Name of the instance (Tentacle): ' in err and 'listening or polling expected' in err
    assert 'is not a port' in err and 'is not a thumbprint' in err
    path = os.path.join(where, 'tentacle', 'tentacle-tentacle.config')
    assert '$ tentacle.py configure --instance Tentacle --trust ' + 'B' * 40 in out
    assert 'agent --instance Tentacle' in out
    values = settings_of(path)
    assert values['Tentacle.Services.PortNumber'] == '0' and os.path.isdir(app)
    assert trusted_in(path) == [trusted_server('B' * 40)]
    assert tentacle.load_identity(our_pem(path)).thumbprint == values[tentacle.KEY_THUMBPRINT]


def polling_worker(machine, octopus, port, *more):
    options = {
        'style': 'polling',
        'directory': os.path.join(machine.folder, 'where'),
        'app': os.path.join(machine.folder, 'apps'),
        'server': octopus.url,
        'name': 'web-1',
        'kind': 'worker',
        'pools': 'Big, Default Worker Pool',
        'key': API_KEY,
        'server-comms-port': str(port),
    }
    words = [word for name, text in options.items() for word in ('--' + name, text)]
    return set_up(machine, '--yes', *words, *more)


def test_setup_of_a_polling_worker(machine, octopus, keys, tmp_path):
    """It shows no key, and proves that the server can be reached, or says why not."""
    with polled(tmp_path, keys) as server:
        code, out, err = polling_worker(machine, octopus, server.port)
        assert code == 0, (out, err)
        assert 'OCTOPUS_API_KEY=*** tentacle.py register-worker' in out and API_KEY not in out + err
        assert 'Reached: https://127.0.0.1:%d/' % server.port in out
        assert octopus.changes[0][2]['WorkerPoolIds'] == ['WorkerPools-2', 'WorkerPools-1']
        code, out, err = polling_worker(machine, octopus, server.port)
        assert code == 1 and '--force' in err  # and what comes after it is not done
        assert polling_worker(machine, octopus, server.port, '--force')[0] == 0
    code, out, err = polling_worker(machine, octopus, server.port, '--force')
    assert code == 1 and 'refuses connections' in err


@pytest.mark.parametrize(
    'words, named',
    [
        (['--yes'], '--thumbprint'),
        (['--yes', '--thumbprint', 'x'], 'is not a thumbprint'),
        (['--yes', '--style', 'polling'], '--server'),
        (['--instance', 'x', '--style', 'both'], 'listening or polling'),
        ([], 'The answers ended at'),
    ],
)
def test_setup_that_is_not_told_enough(machine, words, named):
    before = sorted(os.listdir(machine.folder))
    code, out, err = set_up(machine, *words)
    assert (code, out) == (2, '') and named in err.splitlines()[-1]
    assert sorted(os.listdir(machine.folder)) == before


# -- many targets and jobs


def test_options_of_jobs_on_the_command_line(several, tmp_path):
    cli('trust', 'poll://one/', '0' * 40, home=several)
    dispatcher = tentacle.Dispatcher(several)
    with serving(several):
        detach = ['exec', '--detach', '--expires', '2h', '--retry-lost', 'one', '--', 'x']
        assert cli(*detach, home=several)[:2] == (0, '1 one\n')
        assert list(dispatcher.submit(['web-1'], 'echo hi; exit 3')) == ['web-1']
        with dispatcher.job_store() as store:
            assert over(store, 2).exit_code == 3
            job = store.job(1)
        assert job.retry_lost == 1 and abs(job.expires - job.created - 7200000) < 1000
        out = cli('jobs', home=several)[1]
        assert re.search('^1 +one +waiting', out, re.M) and 'web-1' not in out
        assert cli('cancel', '2', home=several)[1] == 'Job 2 was finished already\n'
        code, _, err = cli('exec', 'one', '--detach', '--file', PROGRAM, '--', 'x', home=several)
        assert code == 2 and '--file does not go' in err
    code, _, err = cli('exec', 'one', '--expires', '2h', '--', 'x', home=several)
    assert code == 2 and 'for --detach' in err


def test_waves_and_failures_on_the_command_line(several, tmp_path):
    words = ['exec', '--json', 'gone', 'web-1', 'web-2', '--max-fail', '0']
    for limit in ('--rolling', '--parallel'):
        out = cli(*words, limit, '1', '--', 'true', home=several)[1]
        results = [json.loads(line) for line in out.splitlines()]
        assert [result['state'] for result in results] == ['unreachable', 'skipped', 'skipped']
    results = tentacle.Dispatcher(several).run(['gone', 'web-1'], 'true', parallel=1, max_fail=0)
    assert [result.state for result in results] == ['unreachable', 'skipped']


def test_files_for_several(several, tmp_path):
    (tmp_path / 'file').write_text('content\n')
    words = ['exec', 'web-*', '--file', str(tmp_path / 'file'), '--json', '--']
    code, out, _ = cli(*words, 'cat file >&2', home=several)
    lines = [json.loads(line) for line in out.splitlines() if 'content' in line]
    assert code == 0 and [line['source'] for line in lines] == ['stderr'] * 2


def test_words_and_a_file_of_targets(several, tmp_path):
    (tmp_path / 'list').write_text('web-2\n')
    out = cli('exec', 'web-1', '-t', str(tmp_path / 'list'), '--', 'echo hi', home=several)[1]
    assert sorted(out.splitlines()) == ['web-1 | hi', 'web-2 | hi']


def test_when_one_was_seen(several, tmp_path, keys):
    cli('trust', 'poll://one/', keys['agent'].thumbprint, home=several)
    identity = tentacle.load_identity(os.path.join(several, 'tentacle.pem'))
    with serving(several) as port:
        with polling(tmp_path, dict(keys_of(keys), server=identity), port):
            assert cli('exec', 'one', '--', 'true', home=several)[0] == 0
        command = [sys.executable, PROGRAM, 'exec', '--home', several, '--queue-timeout', '4']
        code, shown = on_terminal(command + ['one', '--', 'x'])
        assert code == 1 and re.search(r'waiting for one to poll, last seen \d+ s ago', shown)


def test_nobody_waits_for_one_that_has_answered(several):
    command = [sys.executable, PROGRAM, 'exec', '--home', several]
    for words in (['web-1'], ['web-1', 'web-2']):
        code, shown = on_terminal(command + words + ['--', 'sleep 3.3'])
        assert code == 0 and 'waiting' not in shown


def test_ctrl_c_ends_uploads_to_several(several, shared_agent, tmp_path):
    with open(str(tmp_path / 'source'), 'wb') as file:
        file.truncate(300 << 20)  # more than goes in the time of a signal
    there = tmp_path / 'there'
    there.mkdir()
    sections = ''
    with Forwarder(shared_agent.port, lambda number: [('delay', True, 1 << 20)]) as between:
        for number in (1, 2):
            sections += '[slow-%d]\nuri = https://127.0.0.1:%d/\nthumbprint = %s\n' % (
                number,
                between.port,
                shared_agent.identity.thumbprint,
            )
        with open(os.path.join(several, 'targets'), 'a') as file:
            file.write(sections)
        places = ['slow-%d:%s' % (number, there / str(number)) for number in (1, 2)]
        words = ['upload', '--home', several, str(tmp_path / 'source')] + places
        process = subprocess.Popen(
            [sys.executable, PROGRAM] + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        eventually(lambda: len(temporary_files(there)) == 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == b'' and b'2 of 2 failed' in err
    eventually(lambda: os.listdir(str(there)) == [])


def test_the_bar_of_several_adds_them_up(capsys):
    bar = tentacle._OneBar('2 targets', 'x', 200)
    bar._report._silent = False
    for which in 'ab':
        bar._report._said -= 1
        bar.progress(which, 100)
    assert '100%' in capsys.readouterr().err.split('\r')[-1]


def test_a_stranger_that_is_connected_is_listed(several, tmp_path, keys):
    identity = tentacle.load_identity(os.path.join(several, 'tentacle.pem'))
    with serving(several, '--trust', keys['agent'].thumbprint) as port:
        with polling(tmp_path, dict(keys_of(keys), server=identity), port):
            eventually(lambda: 'poll://one/' in cli('targets', home=several)[1])


def test_completion_of_common_options(several):
    assert ' --home --verbose"' in cli('completion', 'bash')[1]
    assert cli('completion', 'zsh')[1].startswith('autoload -U +X bashcompinit && bashcompinit\n')


def test_some_are_left_out_of_an_upload(several, tmp_path):
    (tmp_path / 'file').write_bytes(b'x')
    place = '%s' % (tmp_path / 'copy')
    words = ['upload', str(tmp_path / 'file'), 'web-*:' + place]
    code, out, _ = cli(*words, '!web-2', home=several)
    assert code == 0 and 'web-1' in out and 'web-2' not in out
    code, _, err = cli(*words, '!db', home=several)
    assert code == 2 and 'leaves out nothing' in err


def test_a_check_does_not_wait_for_who_is_not_there(several):
    cli('trust', 'poll://away/', '0' * 40, home=several)
    with serving(several):
        code, out, _ = cli('targets', '--check', '--queue-timeout', '1000', home=several)
    assert code == 1
    assert re.search('^away +unreachable .*not connected', out, re.M)
    assert re.search('^web-1 +ok ', out, re.M)


@pytest.mark.parametrize(
    'line, words',
    [
        ('url = https://x/', 'line 3 has url'),
        ('thumbprint = XYZ', 'mend line 3'),
        ('groups = a\nuri = a b', 'mend line 4'),
    ],
)
def test_lines_of_a_targets_file_that_mean_nothing(tmp_path, line, words):
    text = '# ours\n[web-1]\n%s\n' % line
    (tmp_path / 'targets').write_text(text)
    code, _, err = cli('exec', 'web-1', '--', 'true', home=tmp_path)
    assert code == 1 and words in err and err.count('\n') == 1
    assert (tmp_path / 'targets').read_text() == text


@pytest.mark.parametrize('shell', ['bash', 'fish'])
def test_completion_runs_nothing(tmp_path, shell):
    if not shutil.which(shell):
        pytest.skip('there is no %s here' % shell)
    mark = tmp_path / 'mark'
    (tmp_path / 'targets').write_text('[web-1]\n[$(touch %s)]\n[`touch %s`]\n' % (mark, mark))
    script = cli('completion', shell)[1]
    if shell == 'bash':
        script += 'COMP_WORDS=(tentacle.py exec ""); COMP_CWORD=2; _tentacle_py'
        script += '; echo "${COMPREPLY[@]}"'
    else:
        script += 'complete -C "tentacle.py exec "'
    done = subprocess.run(
        [shell, '-c', script],
        stdout=subprocess.PIPE,
        env=dict(os.environ, TENTACLE_HOME=str(tmp_path), HOME=str(tmp_path)),
        cwd=str(tmp_path),
    )
    assert 'web-1' in done.stdout.decode() and not mark.exists()


def test_standard_streams_that_are_closed(several):
    line = '%s %s exec web-1 --home %s -- "echo hi" %%s' % (sys.executable, PROGRAM, several)
    assert subprocess.check_output(['sh', '-c', line % '<&-']) == b'hi\n'
    assert subprocess.check_output(['sh', '-c', line % '2>&-']) == b'hi\n'
    done = subprocess.run(['sh', '-c', line % '>&-'], stderr=subprocess.PIPE)
    assert done.returncode == 2 and b'no standard output' in done.stderr


def test_who_leaves_the_output_of_several_hears_no_more(several):
    body = 'for i in $(seq 50000); do echo $i; done'
    line = "%s %s exec @live --home %s -- '%s' | head -1" % (sys.executable, PROGRAM, several, body)
    done = subprocess.run(['bash', '-c', line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.count(b'\n') == 1 and done.stderr == b''


# ---- Benchmarks: `make bench`, each beside a baseline of the same run ----------------------------


def measured(what, unit, value, baseline, goal):
    print('%-46s %8.2f %-4s  %-38s goal %s' % (what, value, unit, baseline, goal), flush=True)


def median_ms(function, times):
    """The median of a call's milliseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2] * 1000


def proportional_kb(pid):
    """A process's share of memory: pages that n processes share count for an n-th."""
    return int(
        re.search(r'Pss:\s+(\d+)', open_bytes('/proc/%d/smaps_rollup' % pid).decode()).group(1)
    )


def cpu_seconds(pid):
    """User and system time of a process, without its children."""
    fields = open_bytes('/proc/%d/stat' % pid).rpartition(b')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def bare_tls_round_trips(identity):
    """(function that makes two round trips over a bare TLS connection, function that ends it)"""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(identity.path)
    server = socket.create_server(('127.0.0.1', 0))

    def serve():
        sock, _ = server.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with server_context.wrap_socket(sock, server_side=True) as secure:
            while True:
                data = secure.recv(65536)
                if not data:
                    return
                secure.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    sock = dial(server.getsockname()[1])
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def trips():
        for data in (b'x' * 6, b'x' * 400):
            sock.sendall(data)
            sock.recv(65536)

    return trips, lambda: (sock.close(), server.close())


def bench_calls(agent, client, keys):
    trips, end = bare_tls_round_trips(keys['server'])
    trips()
    bare = median_ms(trips, 2000)
    end()
    call = median_ms(lambda: client.call('ICapabilitiesServiceV2', 'GetCapabilities'), 2000)
    measured('warm capabilities call', 'ms', call, 'two bare TLS round trips %.2f' % bare, '< 0.6')


def bench_scripts(agent, client, keys):
    def ignore(line):
        pass

    client.run_script('true', ignore)  # has the launcher started
    bash = median_ms(lambda: subprocess.run(['bash', '-c', 'true']), 100)
    script = median_ms(lambda: client.run_script('true', ignore), 100)
    measured(
        'a `true` script, start to complete', 'ms', script, '`bash -c true` %.2f' % bash, '< 8'
    )

    started = time.perf_counter()
    for _ in range(100):
        client.run_script('true', ignore)
    in_sequence = 100 / (time.perf_counter() - started)
    measured(
        '100 scripts in sequence', '/s', in_sequence, '`bash -c true` %.0f' % (1000 / bash), 'none'
    )

    def run(number):
        with tentacle.TentacleClient(agent.endpoint, keys['server']) as own:
            own.run_script('true', ignore)

    started = time.perf_counter()
    in_threads(run, range(100))
    at_once = 100 / (time.perf_counter() - started)
    measured(
        '100 scripts at once, a connection each',
        '/s',
        at_once,
        'in sequence %.0f' % in_sequence,
        'none',
    )


def bench_logs(agent, client, keys):
    lines = []
    client.run_script('true', lines.append)
    lines.clear()
    started = time.perf_counter()
    output = subprocess.check_output(['bash', '-c', 'seq 1 200000']).splitlines()
    bare = time.perf_counter() - started
    started = time.perf_counter()
    client.run_script('seq 1 200000', lines.append)
    seconds = time.perf_counter() - started
    assert len([line for line in lines if not line.remark]) == len(output)
    measured(
        '200,000 lines, printed and fetched',
        's',
        seconds,
        'a pipe %.2f, the original 4.1' % bare,
        '< 2',
    )
    peak = memory_kb(agent.process.pid, 'VmHWM') / 1024
    measured('the agent\'s peak memory meanwhile', 'MB', peak, 'the original 242', '< 40')

    before = cpu_seconds(agent.process.pid)
    started = time.perf_counter()
    body = 'for i in $(seq 60); do seq 1 2000; sleep 0.25; done'
    client.run_script(body, lambda line: None)
    spent = cpu_seconds(agent.process.pid) - before
    text = '%.0f s wall, the original 2.3' % (time.perf_counter() - started)
    measured('2,000 lines each 0.25 s for 15 s: agent\'s CPU', 's', spent, text, '< 0.6')


def bench_memory_of_scripts(agent, client, keys):
    tickets = [tentacle.new_ticket() for _ in range(100)]
    before = proportional_kb(agent.process.pid)
    for ticket in tickets:
        command = start_command('sleep 1000', ticket, duration_to_wait=None)
        v2(client, 'StartScript', command)
    ours = [
        pid for pid in below(agent.process.pid) if b'python' in open_bytes('/proc/%d/cmdline' % pid)
    ]
    total = (proportional_kb(agent.process.pid) + sum(map(proportional_kb, ours))) / 1024
    text = 'agent alone %.0f; %.2f a script' % (before / 1024, (total - before / 1024) / 100)
    measured('memory (PSS) with 100 scripts running', 'MB', total, text, 'none')
    for ticket in tickets:
        completed(client, ticket)


def bare_tls_receiving(identity, size):
    """MB/s that a loop of Python's ssl receives from another process and forgets."""
    code = """if True:
        import socket, ssl, sys
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers(sys.argv[2])
        sock = context.wrap_socket(socket.create_connection(('127.0.0.1', int(sys.argv[1]))))
        block = bytes(1 << 20)
        for _ in range(int(sys.argv[3]) >> 20):
            sock.sendall(block)
        sock.recv(1)
        """
    context = tentacle._tls_context(ssl.PROTOCOL_TLS_SERVER, identity)
    with socket.create_server(('127.0.0.1', 0)) as server:
        arguments = [str(server.getsockname()[1]), tentacle.CIPHERS, str(size)]
        sender = subprocess.Popen([sys.executable, '-c', code] + arguments)
        sock, _ = server.accept()
        with context.wrap_socket(sock, server_side=True) as secure:
            buffer = memoryview(bytearray(1 << 20))
            started = time.perf_counter()
            left = size >> 20 << 20
            while left:
                left -= secure.recv_into(buffer)
            seconds = time.perf_counter() - started
            secure.sendall(b'x')
        sender.wait()
    return size / seconds / 1e6


def scp_speed(folder, source, size):
    """MB/s of scp over loopback, None where there is no sshd."""
    import getpass

    sshd = shutil.which('sshd', path='/usr/sbin:/usr/local/sbin')
    if not (sshd and shutil.which('scp')):
        return None
    for name in ('host_key', 'user_key'):
        path = os.path.join(folder, name)
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', path], check=True)
    os.makedirs('/run/sshd', exist_ok=True)
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
    options = {
        'HostKey': os.path.join(folder, 'host_key'),
        'AuthorizedKeysFile': os.path.join(folder, 'user_key.pub'),
        'ListenAddress': '127.0.0.1',
        'Port': port,
        'StrictModes': 'no',
        'UsePAM': 'no',
        'PidFile': 'none',
        'PermitRootLogin': 'yes',
        'Subsystem': 'sftp internal-sftp',
    }
    settings = [word for item in options.items() for word in ('-o', '%s=%s' % item)]
    command = [sshd, '-D', '-e', '-f', '/dev/null'] + settings
    with open(os.path.join(folder, 'sshd.log'), 'wb') as log:
        daemon = subprocess.Popen(command, stderr=log)
    target = '%s@127.0.0.1:%s' % (getpass.getuser(), os.path.join(folder, 'scp-copy'))
    known = ['-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null']
    command = ['scp', '-q', '-P', str(port), '-i', os.path.join(folder, 'user_key')] + known

    def copy(name):
        started = time.perf_counter()
        done = subprocess.run(command + [name, target], stderr=subprocess.DEVNULL)
        return done.returncode == 0 and time.perf_counter() - started

    try:
        eventually(lambda: copy(options['HostKey']))  # it listens
        return size / copy(source) / 1e6
    finally:
        daemon.terminate()
        daemon.wait()


def bench_files(agent, client, keys):
    size = 500 << 20
    folder = agent.home
    source, target = os.path.join(folder, 'source'), os.path.join(folder, 'target')
    with open(source, 'wb') as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    bare = bare_tls_receiving(keys['agent'], size)
    scp = scp_speed(folder, source, size)
    text = 'a bare ssl loop %.0f, scp %s' % (bare, '%.0f' % scp if scp else 'not here')
    speeds = []
    for _ in range(2):
        started = time.perf_counter()
        with open(source, 'rb', buffering=0) as file:
            client.upload(file, target)
        speeds.append(size / (time.perf_counter() - started) / 1e6)
    measured('upload of 500 MB', 'MB/s', max(speeds), text, '> %.0f' % (0.6 * bare))
    started = time.perf_counter()
    with open(source, 'wb', buffering=0) as file:
        client.download(target, file)
    speed = size / (time.perf_counter() - started) / 1e6
    digest, started = tentacle.sha1(), time.perf_counter()
    for _ in range(50):
        digest.update(bytes(1 << 20))
    text = 'SHA-1 alone %.0f on one core' % (50 * 1.048576 / (time.perf_counter() - started))
    measured('download of 500 MB', 'MB/s', speed, text, '> %.0f' % (2 * scp if scp else 0))


def bench_start_and_idle(folder, keys):
    program, environment = installed(folder)
    home = os.path.join(folder, 'idle')
    command = [sys.executable, program, 'listen', '--home', home, '--port', '0']

    def started():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        for line in process.stdout:
            if line.startswith(b'Agent listening on'):
                return process
        raise AssertionError('it did not start')

    def start_and_stop():
        process = started()
        moments.append(time.perf_counter())
        process.terminate()
        process.wait()
        process.stdout.close()

    moments = []
    start_and_stop()  # makes the identity and the bytecode
    seconds = []
    for _ in range(15):
        begun = time.perf_counter()
        start_and_stop()
        seconds.append(moments[-1] - begun)
    python = median_ms(
        lambda: subprocess.run([sys.executable, '-c', 'import ssl'], env=environment), 15
    )
    text = '`python3 -c "import ssl"` %.2f' % (python / 1000)
    measured('start of process to listening', 's', sorted(seconds)[7], text, '< 0.2')

    process = started()
    bare = subprocess.Popen(
        [sys.executable, '-c', 'import ssl, time; time.sleep(1000)'], env=environment
    )
    threading.Event().wait(1)
    before = cpu_seconds(process.pid)
    text = 'Python with ssl %.1f, the original 90' % (memory_kb(bare.pid) / 1024)
    measured('resident memory, idle', 'MB', memory_kb(process.pid) / 1024, text, '< 24')
    threading.Event().wait(60)
    measured('CPU used in 60 s idle', 's', cpu_seconds(process.pid) - before, '', '0.00')
    for child in (process, bare):
        child.terminate()
        child.wait()
    process.stdout.close()


@contextlib.contextmanager
def polled_by_a_process(folder, keys, **limits):
    """(server in this process, process of a tentacle that polls it)"""
    home = os.path.join(folder, 'polling')
    program, environment = installed(folder)
    trusted = [cli('show-thumbprint', home=home)[1].strip()]
    server = tentacle.PollingServer(
        keys['server'], lambda: frozenset(trusted), port=0, limits=LIMITS._replace(**limits)
    )
    server.start()
    command = [sys.executable, program, 'poll', 'https://127.0.0.1:%d/' % server.port]
    command += ['--home', home, '--subscription', 'poll://one/']
    command += ['--trust', keys['server'].thumbprint]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        yield server, process
    finally:
        process.terminate()
        process.wait()
        server.stop()


def bench_polling(folder, keys):
    def call():
        client.call('ICapabilitiesServiceV2', 'GetCapabilities')

    trips, end = bare_tls_round_trips(keys['server'])
    trips()
    text = 'two bare TLS round trips %.2f' % median_ms(trips, 2000)
    end()
    with polled_by_a_process(folder, keys) as (server, process), server.client(ONE) as client:
        call()
        measured('warm call of a polling tentacle', 'ms', median_ms(call, 2000), text, '< 1')
        before = cpu_seconds(process.pid)
        threading.Event().wait(60)
        measured('CPU used by it in 60 s idle', 's', cpu_seconds(process.pid) - before, '', '0.00')
        memory = memory_kb(process.pid) / 1024
        measured('its resident memory', 'MB', memory, 'the original 90', '< 24')
        (poller,) = server._subscriptions['poll://one/'].pollers
        poller.stream._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        quick_ack, tentacle._TCP_QUICKACK = tentacle._TCP_QUICKACK, None
        call()
        slow = median_ms(call, 200)
        tentacle._TCP_QUICKACK = quick_ack
        text = 'the original, by default 88'
        measured('the same, server without TCP_NODELAY', 'ms', slow, text, '< 1')
    waits = 0.01
    with polled_by_a_process(folder, keys, keep_alive=waits) as (server, process):
        eventually(server.connections)
        process.terminate()
        process.wait()
        imports = 'python3 -c "import ssl" %.2f, CPU %.2f'
        imports %= seconds_of([sys.executable, '-c', 'import ssl'], folder)
        for way in (['tentacle.py'], ['-m', 'tentacle']):
            command = [sys.executable] + way + process.args[2:] + ['--once']
            seconds, cpu = seconds_of(command, folder)
            what = 'idle tick, python3 %s poll --once' % ' '.join(way)
            measured(what, 's', seconds - waits, imports, '')
            measured('its CPU', 's', cpu, '', '')


def seconds_of(command, folder, times=15):
    """(median of seconds, mean of CPU seconds) of a process."""
    _, environment = installed(folder)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = lambda: subprocess.run(command, cwd=folder, env=environment, check=True, **quiet)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    milliseconds = median_ms(run, times)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return milliseconds / 1000, cpu / times


A_THOUSAND_TENTACLES = '''
import resource, sys, tentacle
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
pem, home, trusted, url = sys.argv[1:]
identity = tentacle.load_identity(pem)
services = tentacle.AgentServices(home)
services.start()
for number in range(1000):
    tentacle.PollingTentacle(
        services, identity, lambda: frozenset([trusted]), [url], 'poll://n%d/' % number
    ).start()
sys.stdin.read()
'''


A_HANDFUL_OF_TENTACLES = '''
import sys, tentacle
pem, home, trusted, count = sys.argv[1:]
identity = tentacle.load_identity(pem)
services = tentacle.AgentServices(home)
services.start()
for number in range(int(count)):
    agent = tentacle.ListeningTentacle(
        services, identity, lambda: frozenset([trusted]), '127.0.0.1', 0
    )
    agent.start()
    print(agent.port, flush=True)
sys.stdin.read()
'''


def bench_fan_out(folder, keys):
    """A script on 100 listening tentacles, in five processes."""
    home = os.path.join(folder, 'fan-out')
    program, environment = installed(folder)
    thumbprint = cli('show-thumbprint', home=home)[1].strip()
    processes, sections = [], ''
    for number in range(5):
        arguments = [keys['agent'].path, os.path.join(folder, 'hosts-%d' % number), thumbprint]
        process = subprocess.Popen(
            [sys.executable, '-c', A_HANDFUL_OF_TENTACLES] + arguments + ['20'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=os.path.dirname(PROGRAM),
        )
        processes.append(process)
        for host in range(20):
            port = int(process.stdout.readline())
            sections += '[host-%d-%d]\nuri = https://127.0.0.1:%d/\nthumbprint = %s\n' % (
                number,
                host,
                port,
                keys['agent'].thumbprint,
            )
    with open(os.path.join(home, 'targets'), 'w') as file:
        file.write(sections)
    command = [sys.executable, program, 'exec', '--home', home, '*', '--', 'true']
    run = lambda: subprocess.run(command, env=environment, check=True)
    run()
    loop = 'for i in $(seq 100); do bash -c true; done'
    text = 'a shell loop of `bash -c true` %.2f'
    text %= median_ms(lambda: subprocess.run(['bash', '-c', loop]), 3) / 1000
    measured('`true` on 100 listening tentacles', 's', median_ms(run, 5) / 1000, text, '')
    for process in processes:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def bare_handshakes(identity, count):
    """Seconds of so many handshakes with client certificates, each after the other, between a
    process that does nothing else and this one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.path)
    context.load_verify_locations(identity.path)
    context.verify_mode = ssl.CERT_OPTIONAL
    dialler = (
        'import socket, ssl, sys\n'
        'context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)\n'
        'context.check_hostname, context.verify_mode = False, ssl.CERT_NONE\n'
        'context.load_cert_chain(sys.argv[1])\n'
        'for _ in range(%d):\n'
        '    sock = socket.create_connection(("127.0.0.1", int(sys.argv[2])))\n'
        '    context.wrap_socket(sock).recv(1)\n' % count
    )
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.Popen([sys.executable, '-c', dialler, identity.path, str(port)])
        begun = None
        for _ in range(count):
            sock, _ = server.accept()
            begun = begun or time.perf_counter()
            with context.wrap_socket(sock, server_side=True) as secure:
                secure.sendall(b'x')
        seconds = time.perf_counter() - begun
    process.wait()
    return seconds


def bench_a_thousand(folder, keys):
    home = os.path.join(folder, 'serve')
    program, environment = installed(folder)
    thumbprint = cli('show-thumbprint', home=home)[1].strip()
    socket_path = os.path.join(home, 'serve.sock')
    identity = tentacle.load_identity(os.path.join(home, 'tentacle.pem'))
    serve = subprocess.Popen(
        [sys.executable, program, 'serve', '--home', home, '--port', '0']
        + ['--trust', keys['agent'].thumbprint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    port = int(serve.stdout.readline().decode().rpartition(':')[2])

    def client_of(number):
        endpoint = tentacle.ServiceEndPoint('poll://n%d/' % number)
        return tentacle.RelayedClient(socket_path, endpoint, identity)

    def connected():
        with client_of(0) as client:
            return len(client.call('TentaclePy', 'Connections'))

    def job(number):
        with client_of(number) as client:
            assert client.run_script('echo %d' % number, lambda line: None) == 0

    connected()
    memory, cpu = proportional_kb(serve.pid), cpu_seconds(serve.pid)
    begun = time.perf_counter()
    arguments = [keys['agent'].path, os.path.join(folder, 'thousand'), thumbprint]
    agents = subprocess.Popen(
        [sys.executable, '-c', A_THOUSAND_TENTACLES] + arguments + ['https://127.0.0.1:%d/' % port],
        stdin=subprocess.PIPE,
        cwd=os.path.dirname(PROGRAM),
    )
    pause = threading.Event().wait
    while connected() < 1000:
        pause(0.2)
    taken = time.perf_counter() - begun
    text = 'bare handshakes in turn %.1f, the original 2.8' % bare_handshakes(keys['agent'], 1000)
    measured('1,000 polling tentacles connect', 's', taken, text, 'not slower')
    each = (proportional_kb(serve.pid) - memory) / 1000
    measured('memory of `serve` for each', 'kB', each, 'the original 77', '< 60')
    cpu = cpu_seconds(serve.pid)
    pause(60)  # each has two null requests
    cpu = (cpu_seconds(serve.pid) - cpu) / 3
    measured('CPU of `serve` in 20 s, all idle', 's', cpu, 'the original 1.1', '< 0.2')
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        list(threads.map(job, range(1000)))
    measured('a script for each, 32 at once', 's', time.perf_counter() - begun, '', '')

    cpu = cpu_seconds(serve.pid)
    begun = time.perf_counter()
    with client_of(0) as client:
        for number in range(1000):
            uri = 'poll://n%d/' % number
            facts = [[uri, uri, None]], 'true', None, False
            client.call('TentaclePy', 'AddJobs', *facts)
    taken = time.perf_counter() - begun
    measured('a kept job for each: taken', '/s', 1000 / taken, '', '')
    store = tentacle.JobStore(home, read_only=True)
    eventually(lambda: not store.jobs(everything=False), 300)
    text = 'CPU of `serve` %.1f s, its memory %.0f MB' % (
        cpu_seconds(serve.pid) - cpu,
        memory_kb(serve.pid) / 1024,
    )
    measured('all of them brought to their ends', 's', time.perf_counter() - begun, text, '')
    assert {job.state for job in store.jobs()} == {'finished'}
    store.close()
    agents.stdin.close()
    agents.kill()
    agents.wait()
    serve.terminate()
    serve.wait()
    serve.stdout.close()


def bench():
    print('Python %s, %s, %d cores' % (sys.version.split()[0], ssl.OPENSSL_VERSION, os.cpu_count()))
    with tempfile.TemporaryDirectory(prefix='tentacle-bench-') as folder:
        keys = Keys(folder)
        bench_start_and_idle(folder, keys)
        bench_polling(folder, keys)
        bench_a_thousand(folder, keys)
        bench_fan_out(folder, keys)
        for part in (bench_calls, bench_files, bench_scripts, bench_logs, bench_memory_of_scripts):
            home = os.path.join(folder, part.__name__)
            agent = Agent(home, '--trust', keys['server'].thumbprint)
            try:
                with tentacle.TentacleClient(agent.endpoint, keys['server']) as client:
                    part(agent, client, keys)
            finally:
                agent.stop()


if __name__ == '__main__':
    bench()
