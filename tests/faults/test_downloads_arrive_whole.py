"""A file that is fetched or unpacked is the one that was published, to its last byte, or there is a sentence and no
file."""

import functools, gzip, hashlib, http.server, io, os, re, tarfile, threading, zipfile
from pathlib import Path
import numpy as np
import pytest
import hiermetric.downloads as hd
from hiermetric.core import HiermetricError
from hiermetric.downloads import download, unpack
from hiermetric.images.named import DATASETS, list_datasets

BODY = np.random.default_rng(0).bytes(200_000)
SUM = f'sha256:{hashlib.sha256(BODY).hexdigest()}'


class Server(http.server.BaseHTTPRequestHandler):
    "Serves BODY in whatever way `plan` says, one entry a request and the last one for ever"

    protocol_version = 'HTTP/1.1'

    def __init__(self, *a, plan, asked, **kw):
        self.plan, self.asked = plan, asked
        super().__init__(*a, **kw)

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.asked.append(dict(self.headers))
        step = self.plan[min(len(self.asked), len(self.plan)) - 1]
        self.close_connection = True
        try:
            step(self)
        except (BrokenPipeError, ConnectionResetError):
            pass


def send(h, status=200, body=BODY, most=None, length=True, etag='"1"', span=None, **headers):
    h.send_response(status)
    if etag:
        h.send_header('ETag', etag)
    if length:
        h.send_header('Content-Length', str(len(body)))
    if span:
        h.send_header('Content-Range', span)
    for k, v in headers.items():
        h.send_header(k.replace('_', '-'), v)
    h.end_headers()
    h.wfile.write(body[:most])


def plain(**kw):
    return lambda h: send(h, **kw)


def ranged(body=BODY, **kw):
    "A server as it should be: continues the version that it has, sends another whole"

    def step(h):
        r, same = h.headers.get('Range'), h.headers.get('If-Range') in (None, kw.get('etag', '"1"'))
        if not r or not same:
            return send(h, body=body, **kw)
        start = int(re.match(r'bytes=(\d+)-', r)[1])
        send(h, 206, body[start:], span=f'bytes {start}-{len(body) - 1}/{len(body)}', **kw)

    return step


@pytest.fixture
def serve():
    servers = []

    def start(*plan):
        asked = []
        srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Server, plan=plan, asked=asked))
        threading.Thread(target=srv.serve_forever, daemon=True).start()
        servers.append(srv)
        return f'http://127.0.0.1:{srv.server_port}/x.bin', asked

    yield start
    for o in servers:
        o.shutdown()
        o.server_close()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv('HIERMETRIC_CACHE', str(tmp_path / 'cache'))
    naps = []
    monkeypatch.setattr(hd.time, 'sleep', naps.append)
    return naps


def get(url, tmp_path, checksum=None, **kw):
    return download(url, tmp_path / 'd' / 'x.bin', checksum, progress=False, **kw).read_bytes()


def refused(url, tmp_path, says, *a, **kw):
    with pytest.raises(HiermetricError, match=says):
        get(url, tmp_path, *a, **kw)
    assert not (tmp_path / 'd' / 'x.bin').exists()


def test_a_new_version_is_not_glued_to_an_old_one(serve, tmp_path):
    url, asked = serve(plain(most=90_000, etag='"old"'), ranged(BODY[::-1], etag='"new"'))
    assert (
        get(url, tmp_path) == BODY[::-1]
        and asked[1]['If-Range'] == '"old"'
        and asked[1]['Range'] == 'bytes=90000-'
        and os.listdir(tmp_path / 'd') == ['x.bin']
    )


@pytest.mark.parametrize('tag', [None, 'W/"1"'])
def test_a_part_that_nobody_vouches_for_starts_over(serve, tmp_path, tag):
    url, asked = serve(plain(most=90_000, etag=tag), ranged(BODY[::-1], etag=tag))
    assert get(url, tmp_path) == BODY[::-1] and 'Range' not in asked[1]


def test_the_date_vouches_where_there_is_no_tag(serve, tmp_path):
    day = 'Mon, 30 Nov 2026 09:00:00 GMT'
    url, asked = serve(plain(most=90_000, etag=None, Last_Modified=day), ranged(etag=None, Last_Modified=day))
    get(url, tmp_path)
    assert asked[1]['If-Range'] == day


@pytest.mark.parametrize('span', ['bytes 0-109999/200000', 'bytes 90001-199999/200000', 'nonsense', None])
def test_bytes_that_were_not_asked_for_are_not_appended(serve, tmp_path, span):
    url, asked = serve(plain(most=90_000), plain(status=206, body=BODY[:110_000], span=span))
    refused(url, tmp_path, 'asked for the bytes from 90000 on')


@pytest.mark.parametrize('checksum', [SUM, None])
def test_a_part_of_another_process_is_continued_or_not(serve, tmp_path, checksum):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'x.bin.part').write_bytes(BODY[:50_000])
    url, asked = serve(ranged())
    assert get(url, tmp_path, checksum) == BODY and ('Range' in asked[0]) == bool(checksum)


def test_a_cut_without_a_length_is_not_taken_for_the_end(serve, tmp_path):
    url, _ = serve(plain(length=False, most=120_000))
    refused(url, tmp_path, 'does not say how long the file is')
    url, _ = serve(plain(length=False))
    assert get(url, tmp_path, SUM) == BODY  # the checksum tells
    (tmp_path / 'd' / 'x.bin').unlink()
    url, _ = serve(plain(length=False, most=120_000))
    refused(url, tmp_path, 'instead of', SUM)


@pytest.mark.parametrize('code', [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(serve, tmp_path, places, code):
    busy = plain(status=code, body=b'', etag=None)
    url, asked = serve(busy, busy, ranged())
    assert get(url, tmp_path) == BODY and len(asked) == 3 and places == [1, 2]
    (tmp_path / 'd' / 'x.bin').unlink()
    url, asked = serve(busy)
    refused(url, tmp_path, str(code))
    assert len(asked) == 5


def test_a_server_that_says_when_is_asked_then(serve, tmp_path, places):
    url, _ = serve(
        plain(status=503, body=b'', Retry_After='7'), plain(status=503, body=b'', Retry_After='3600'), ranged()
    )
    get(url, tmp_path)
    assert places == [7, 60]


def test_what_is_not_there_is_told_at_once(serve, tmp_path, places):
    url, asked = serve(plain(status=404, body=b''))
    refused(url, tmp_path, '404.*put it at')
    assert len(asked) == 1 and not places


def stall(h):
    send(h, most=30_000)
    h.wfile.flush()
    threading.Event().wait(1.0)


def silent(h):
    threading.Event().wait(1.0)


def test_a_stall_is_cut_and_continued(serve, tmp_path):
    url, asked = serve(silent, stall, ranged())
    assert get(url, tmp_path, timeout=0.3) == BODY and asked[2]['Range'] == 'bytes=30000-'


def test_a_server_that_never_speaks_is_given_up(serve, tmp_path, places):
    url, asked = serve(silent)
    refused(url, tmp_path, 'timed out', timeout=0.2, tries=3)
    assert len(asked) == 3 and places == [1, 2]


def test_a_page_that_was_packed_on_the_way_is_not_the_file(serve, tmp_path):
    url, _ = serve(plain(body=gzip.compress(BODY), Content_Encoding='gzip'))
    refused(url, tmp_path, 'packed as gzip')


def test_a_server_that_has_less_than_is_here(serve, tmp_path):
    short = plain(status=416, body=b'', span='bytes */70000', etag=None)
    url, _ = serve(plain(most=90_000), short)
    refused(url, tmp_path, 'has less of the file')
    url, _ = serve(ranged())
    assert get(url, tmp_path) == BODY


def test_eight_at_once_fetch_it_once(serve, tmp_path):
    def slow(h):
        h.send_response(200)
        h.send_header('Content-Length', str(len(BODY)))
        h.end_headers()
        for i in range(0, len(BODY), 50_000):
            h.wfile.write(BODY[i : i + 50_000])
            threading.Event().wait(0.03)

    url, asked = serve(slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(get(url, tmp_path))) for _ in range(8)]
    for o in threads:
        o.start()
    for o in threads:
        o.join()
    assert found == [BODY] * 8 and len(asked) == 1 and os.listdir(tmp_path / 'd') == ['x.bin']


def test_every_data_set_has_a_checksum_or_says_that_there_is_none():
    import hiermetric.images.named as D

    sources = {'tiny-imagenet': D.TINY_IMAGENET, 'planktonset': D.PLANKTONSET, 'cifar-100': D.CIFAR_100}
    assert {*sources, 'synthetic-taxa'} == set(DATASETS)
    for name, o in sources.items():
        assert bool(o.checksum) != ('no checksum' in list_datasets().loc[name, 'about'])


# archives


def zipped(path, *entries, mode=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, 'w', mode) as z:
        for name, data in entries:
            z.writestr(name, data)
    return path


def tarred(path, *entries, mode='w:gz'):
    with tarfile.open(path, mode) as t:
        for name, data in entries:
            if isinstance(data, tarfile.TarInfo):
                t.addfile(data)
                continue
            o = tarfile.TarInfo(name)
            o.size = len(data)
            t.addfile(o, io.BytesIO(data))
    return path


FILES = [(f'a/{i}.txt', bytes([65 + i]) * 3000) for i in range(8)]


def same(folder):
    return {(o.relative_to(folder).as_posix(), o.read_bytes()) for o in folder.rglob('*') if o.is_file()} == set(FILES)


@pytest.mark.parametrize(
    'make',
    [
        lambda p: zipped(p / 'x.zip', *FILES),
        lambda p: tarred(p / 'x.tar.gz', *FILES),
        lambda p: tarred(p / 'x.tar.xz', *FILES, mode='w:xz'),
        lambda p: tarred(p / 'x.tar.bz2', *FILES, mode='w:bz2'),
    ],
)
def test_a_flipped_bit_in_an_archive_is_told(tmp_path, make):
    made, rng, told = make(tmp_path), np.random.default_rng(0), 0
    good = made.read_bytes()
    assert same(unpack(made, tmp_path / 'whole'))
    for k in range(60):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        made.write_bytes(bad)
        try:
            assert same(unpack(made, tmp_path / f'{k}'))  # what does not matter: dates, rights
        except HiermetricError:
            told += 1
            assert not (tmp_path / f'{k}').exists()
    assert told > 20


@pytest.mark.parametrize('cut', [1, 512, 1024, 5000, 20_000])
def test_a_cut_tar_is_told(tmp_path, cut):
    made = tarred(tmp_path / 'x.tar', *FILES, mode='w')
    made.write_bytes(made.read_bytes().rstrip(b'\0')[:-cut] if cut < 600 else made.read_bytes()[: -cut - 9 * 1024])
    with pytest.raises(HiermetricError, match='damaged'):
        unpack(made, tmp_path / 'out')


def link(name, to, kind=tarfile.SYMTYPE):
    o = tarfile.TarInfo(name)
    o.type = kind
    o.linkname = to
    return name, o


def encrypted(p):
    made = zipped(p / 'x.zip', ('a', b'secret'), mode=zipfile.ZIP_STORED)
    b = bytearray(made.read_bytes())
    for sign, at in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
        b[b.index(sign) + at] |= 1
    made.write_bytes(b)
    return made


def unknown(p):
    made = zipped(p / 'x.zip', ('a', b'data'), mode=zipfile.ZIP_STORED)
    b = bytearray(made.read_bytes())
    for sign, at in ((b'PK\3\4', 8), (b'PK\1\2', 10)):
        b[b.index(sign) + at] = 99
    made.write_bytes(b)
    return made


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize(
    'make, says',
    [
        (lambda p: zipped(p / 'x.zip', ('../up', b'')), 'points outside'),
        (lambda p: zipped(p / 'x.zip', ('/etc/x', b'')), 'points outside'),
        (lambda p: tarred(p / 'x.tar.gz', ('../up', b'')), 'points outside'),
        (lambda p: tarred(p / 'x.tar.gz', link('a', '/etc/passwd')), 'unsafe'),
        (lambda p: tarred(p / 'x.tar.gz', link('a', '../../b', tarfile.LNKTYPE)), 'unsafe'),
        (lambda p: tarred(p / 'x.tar.gz', link('d', '..'), ('d/x', b'')), 'unsafe|outside'),
        (lambda p: tarred(p / 'x.tar.gz', link('dev', '', tarfile.CHRTYPE)), 'unsafe'),
        (lambda p: zipped(p / 'x.zip', ('a', b'1'), ('a', b'2')), "two entries that would both be 'a'"),
        (lambda p: tarred(p / 'x.tar.gz', ('a', b'1'), ('a', b'2')), "two entries that would both be 'a'"),
        (lambda p: zipped(p / 'x.zip', ('a/b', b'1'), ('a', b'2')), "two entries|cannot be unpacked"),
        (lambda p: zipped(p / 'x.zip', ('a', b'1'), ('a/b', b'2')), 'cannot be unpacked'),
        (lambda p: zipped(p / 'x.zip', ('n' * 300, b'1')), 'cannot be unpacked .*name too long'),
        (lambda p: tarred(p / 'x.tar.gz', ('n' * 300, b'1')), 'cannot be unpacked .*name too long'),
        (encrypted, 'is encrypted'),
        (unknown, 'packed in a way that cannot be read'),
        (lambda p: Path(p / 'x.zip').write_bytes(b'<html>not found</html>') and p / 'x.zip', 'damaged'),
    ],
)
def test_what_an_archive_may_not_hold_is_a_sentence(tmp_path, make, says):
    (tmp_path / 'd').mkdir()
    made = make(tmp_path)
    with pytest.raises(HiermetricError, match=says) as e:
        unpack(made, tmp_path / 'd' / 'out')
    assert (
        str(made) in str(e.value)
        and '\n' not in str(e.value)
        and os.listdir(tmp_path / 'd') == []
        and set(os.listdir(tmp_path)) <= {'d', 'cache', made.name}
    )


def test_a_bomb_is_refused_before_it_goes_off(tmp_path, monkeypatch):
    made = zipped(tmp_path / 'x.zip', *[(f'{i}', bytes(2**20)) for i in range(5)])
    tar = tarred(tmp_path / 'x.tar.gz', *[(f'{i}', bytes(2**20)) for i in range(5)])
    monkeypatch.setattr(hd, '_LEAST', 2**18)
    for o in (made, tar):
        with pytest.raises(HiermetricError, match='would unpack to more than'):
            unpack(o, tmp_path / 'out')
        assert unpack(o, tmp_path / f'{o.name}-out', most=5000).is_dir()
    monkeypatch.setattr(hd.shutil, 'disk_usage', lambda p: type('', (), dict(free=2**21)))
    with pytest.raises(HiermetricError, match='left on that disk'):
        unpack(made, tmp_path / 'out', most=5000)
    assert not (tmp_path / 'out').exists()


def test_twelve_at_once_unpack_it_once(tmp_path):
    made = tarred(tmp_path / 'x.tar.gz', *FILES)
    (tmp_path / 'd').mkdir()
    pids = []
    for _ in range(12):
        if (pid := os.fork()) == 0:
            try:
                ok = same(unpack(made, tmp_path / 'd' / 'out'))
            except BaseException:
                ok = False
            os._exit(not ok)
        pids.append(pid)
    assert [os.waitpid(o, 0)[1] for o in pids] == [0] * 12 and os.listdir(tmp_path / 'd') == ['out']
