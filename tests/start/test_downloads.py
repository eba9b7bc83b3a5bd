"Downloads from a server on this machine that cuts its transfers."

import functools, hashlib, http.server, os, re, threading
import pytest
from hiermetric.core import HiermetricError
from hiermetric.downloads import download

BODY = bytes(range(256)) * 1200  # 307,200 bytes, each position tells where it is


class Cutting(http.server.BaseHTTPRequestHandler):
    "Sends at most `most` bytes of BODY a request, chunked or not, and hangs up"

    protocol_version = 'HTTP/1.1'

    def __init__(self, *a, most, chunked, ranges, asked, **kw):
        self.most, self.chunked, self.ranges, self.asked = most, chunked, ranges, asked
        super().__init__(*a, **kw)

    def log_message(self, *a):
        pass

    def do_GET(self):
        r = self.headers.get('Range')
        self.asked.append(r)
        start = int(re.match(r'bytes=(\d+)-$', r)[1]) if r and self.ranges else 0
        if start >= len(BODY):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(BODY)}')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header('ETag', '"1"')
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(BODY) - 1}/{len(BODY)}')
        self.send_header(
            *(('Transfer-Encoding', 'chunked') if self.chunked else ('Content-Length', str(len(BODY) - start)))
        )
        self.end_headers()
        data = BODY[start : start + self.most]
        if self.chunked:
            for i in range(0, len(data), 10_000):
                o = data[i : i + 10_000]
                self.wfile.write(b'%x\r\n%s\r\n' % (len(o), o))
            if len(data) == len(BODY) - start and not self.ranges == 'no end':
                self.wfile.write(b'0\r\n\r\n')
        else:
            self.wfile.write(data)
        self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def start(most=len(BODY), chunked=True, ranges=True):
        asked = []
        srv = http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Cutting, most=most, chunked=chunked, ranges=ranges, asked=asked)
        )
        threading.Thread(target=srv.serve_forever, daemon=True).start()
        servers.append(srv)
        return f'http://127.0.0.1:{srv.server_port}/x.bin', asked

    yield start
    for o in servers:
        o.shutdown()
        o.server_close()


@pytest.mark.parametrize('chunked', [True, False])
def test_a_transfer_that_is_cut_goes_on_where_it_stopped(serve, tmp_path, chunked):
    url, asked = serve(most=125_000, chunked=chunked)
    p = download(url, tmp_path / 'x.bin', f'sha256:{hashlib.sha256(BODY).hexdigest()}', progress=False)
    assert (
        p.read_bytes() == BODY
        and asked == [None, 'bytes=125000-', 'bytes=250000-']
        and os.listdir(tmp_path) == ['x.bin']
    )


def test_only_the_end_mark_is_missing(serve, tmp_path):
    url, asked = serve(ranges='no end')
    assert download(url, tmp_path / 'x.bin', progress=False).read_bytes() == BODY and asked == [
        None,
        f'bytes={len(BODY)}-',
    ]


@pytest.mark.parametrize('chunked', [True, False])
def test_a_server_that_starts_over_each_time_is_given_up(serve, tmp_path, chunked):
    url, asked = serve(most=125_000, chunked=chunked, ranges=False)
    with pytest.raises(HiermetricError, match=r'Could not download .*put it at .*x\.bin'):
        download(url, tmp_path / 'x.bin', progress=False)
    assert (
        asked == [None, 'bytes=125000-']
        and not (tmp_path / 'x.bin').exists()
        and (tmp_path / 'x.bin.part').stat().st_size == 125_000
    )


def test_an_answer_that_is_no_http_is_a_sentence(tmp_path):
    import socket

    with socket.create_server(('127.0.0.1', 0)) as s:

        def answer():
            c, _ = s.accept()
            with c:
                c.recv(4096)
                c.sendall(b'hello\r\n\r\n')

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(HiermetricError, match='Could not download'):
            download(f'http://127.0.0.1:{s.getsockname()[1]}/x', tmp_path / 'x', progress=False, timeout=5)
