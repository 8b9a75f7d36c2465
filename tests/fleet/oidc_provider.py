"""A small OpenID Connect provider on loopback: discovery, authorization code with PKCE, signed ID tokens, keys that rotate."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey


class Provider:
    """The provider; ``claims`` is who logs in, ``wrong`` what it puts into the ID token that does not belong there."""

    def __init__(self) -> None:
        self.claims = {"sub": "u-1", "preferred_username": "robin", "groups": ["fleet-operators"]}
        self.wrong: dict = {}
        self.codes: dict[str, dict] = {}
        self.discovered = self.keys_asked = 0
        self.secret, self.signer = "", None
        self.rotate()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.get(self)

            def do_POST(self):
                outer.post(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def rotate(self) -> None:
        self.key = RSAKey.generate_key(2048, parameters={"kid": secrets.token_hex(4), "use": "sig"})

    @staticmethod
    def answer(handler, data, status: int = 200) -> None:
        body = json.dumps(data).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def get(self, handler) -> None:
        parts = urlsplit(handler.path)
        match parts.path:
            case "/.well-known/openid-configuration":
                self.discovered += 1
                ends = {"authorization_endpoint": "/authorize", "token_endpoint": "/token", "jwks_uri": "/keys"}
                self.answer(handler, {"issuer": self.url} | {name: self.url + path for name, path in ends.items()})
            case "/keys":
                self.keys_asked += 1
                self.answer(handler, {"keys": [self.key.as_dict(private=False)]})
            case "/authorize":
                asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
                code = secrets.token_urlsafe(16)
                self.codes[code] = asked
                handler.send_response(303)
                handler.send_header(
                    "Location", f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state'], 'iss': self.url})}"
                )
                handler.end_headers()
            case _:
                self.answer(handler, {}, 404)

    def post(self, handler) -> None:
        data = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
        form = {name: values[0] for name, values in parse_qs(data).items()}
        asked = self.codes.pop(form.get("code", ""), None)
        challenge = (
            base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest()).decode().rstrip("=")
        )
        if asked is None or asked["code_challenge"] != challenge or asked["redirect_uri"] != form["redirect_uri"]:
            self.answer(handler, {"error": "invalid_grant"}, 400)
            return
        if self.secret and form.get("client_secret") != self.secret:
            self.answer(handler, {"error": "invalid_client"}, 401)
            return
        now = int(time.time())
        claims = {"iss": self.url, "aud": asked["client_id"], "iat": now, "exp": now + 300, "nonce": asked["nonce"]}
        key = self.signer or self.key
        token = jwt.encode({"alg": "RS256", "kid": self.key.kid}, claims | self.claims | self.wrong, key)
        self.answer(handler, {"id_token": token, "access_token": "a", "token_type": "Bearer"})
