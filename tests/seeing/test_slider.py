"""The confidence slider: its numbers against loops, its HTML, and the page in headless Chromium, driven over the
DevTools protocol."""

import base64, fcntl, json, os, re, select, shutil, subprocess, time
from html.parser import HTMLParser
import numpy as np, pytest, torch
from PIL import Image
from hiermetric.core import HiermetricError
from hiermetric.seeing.slider import confidence_slider, confidence_steps
from hiermetric.trees.taxonomy import Taxonomy

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
WIDTHS = 1200, 375
CHANGES = 0.7, 0.85, 0.9, 0.95, 0.99  # between any two, answers of the toy change
EVIL = (
    '</script><script>window.hacked = 1</script>',
    '<img src=x onerror="window.hacked = 1">',
    "DATA & 'ID' <b>CARDS</b> a_very_long_name_without_any_blank_in_it_at_all",
)


def toy(names=('cat', 'dog', 'bat', 'owl', 'wren', 'tit'), seed=0, inner=False):
    tax = Taxonomy.from_paths({o: ('mammal', 'bird')[i // 3] for i, o in enumerate(names)})
    rng = np.random.default_rng(seed)
    column = tax.leaf_column[tax.index(list(names))]
    y = rng.integers(0, 6, 600)
    group = y // 3
    logits = np.zeros((600, 6))
    logits[:, column] = 3.0 * np.eye(6)[y] + 3.0 * np.repeat(np.eye(2), 3, 1)[group] + 2 * rng.normal(size=(600, 6))
    probs, truth = tax.node_probs(torch.tensor(logits).softmax(1)), np.asarray(tax.index(list(names)))[y]
    if inner:
        truth[::5] = tax.parents[truth[::5]]
    return tax, (probs[:300], truth[:300]), (probs[300:], truth[300:])


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (60 + 40 * i, 90, 3), dtype=np.uint8)).save(folder / f'{i}.png')
    return [folder / f'{i}.png' for i in range(4)]


def examples(steps, pictures):  # images whose answer moves most
    return dict(zip(np.argsort(-(np.diff(steps.nodes, axis=0) != 0).sum(0), kind='stable').tolist(), pictures))


def parts(page):  # what the page's script holds, as it reads it
    return json.loads(re.search(r'const d = (.*), root = ', page)[1])


class Scripts(HTMLParser):
    "Tags as a browser sees them"

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize('inner', [False, True])
def test_stops_count_what_a_loop_counts(inner):
    tax, val, test = toy(inner=inner)
    steps = confidence_steps(val, test, tax, [0.5, 0.9, 0.97])
    ups = [set(tax.ancestors(u).tolist()) for u in range(len(tax))]
    for k, answers in enumerate(steps.nodes):
        for u in range(len(tax)):
            count = np.zeros(4)
            n = 0
            for a, t in zip(answers.tolist(), test[1].tolist()):
                if u not in ups[t]:
                    continue
                n += 1
                count[3 if a not in ups[t] else 1 if a == u else 0 if u in ups[a] else 2] += 1
            assert n == steps.images[u]
            np.testing.assert_allclose(steps.stops[:, k, u], count / n)
    wrong = [np.mean([a not in ups[t] for a, t in zip(o, test[1])]) for o in steps.nodes]
    np.testing.assert_allclose(steps.table.right, 1 - np.array(wrong))


def test_a_branch_without_images_is_left_out():
    tax, val, (probs, truth) = toy()
    owl = tax.index('owl')
    keep = truth != owl
    steps = confidence_steps(val, (probs[keep], truth[keep]), tax, [0.5, 0.9])
    assert steps.images[owl] == 0 and not steps.stops[:, :, owl].any() and np.isfinite(steps.stops).all()
    trace = parts(confidence_slider(steps))['trace']
    assert 'owl' not in trace['labels'] and 'bird' in trace['labels'] and trace['values'][0] == keep.sum()


def test_the_page_holds_what_the_steps_say(pictures):
    tax, val, test = toy()
    steps = confidence_steps(val, test, tax, [0.5, 0.8, 0.9, 0.99])
    shown = examples(steps, pictures)
    page = confidence_slider(steps, shown, start=0.91, title='Toy & more')
    d = parts(page)
    np.testing.assert_allclose(d['stops'], steps.stops.transpose(1, 2, 0), atol=6e-4)
    for row, (_, want) in zip(d['table'], steps.table.iterrows()):
        np.testing.assert_allclose([row[c] for c in steps.table], want, atol=1e-6)
    nodes = list(map(int, d['trace']['ids']))
    assert nodes == list(range(len(tax)))
    assert [tax.parents[i] for i in nodes[1:]] == list(map(int, d['trace']['parents'][1:])) and d['trace']['parents'][
        0
    ] == ''
    for i, answers in zip(shown, d['cards']):
        for k, a in enumerate(answers):
            node, truth = int(steps.nodes[k, i]), int(steps.targets[i])
            right = node in tax.ancestors(truth)
            assert a['name'] == tax.names[node] and a['kind'] == (
                'wrong' if not right else 'exact' if node == truth else 'coarse' if node else 'nothing'
            )
            assert a['verdict'][0] == {'wrong': '✗', 'nothing': '○'}.get(a['kind'], '✓') and a['path'] == ' › '.join(
                tax.path(node).split('/')[1:-1]
            )
    assert len({a['name'] for o in d['cards'] for a in o}) > 2  # species, class, root: the examples do change
    seen = Scripts(page)
    sliders = [a for t, a in seen.tags if t == 'input']
    assert (
        [(o['min'], o['max'], o['value']) for o in sliders] == [('0', '3', '2')]
        and ('meta', {'charset': 'utf-8'}) in seen.tags
        and 'Toy & more' in seen.text
    )
    assert [a['for'] for t, a in seen.tags if t == 'label'] == [sliders[0]['id']]
    images = [a['src'] for t, a in seen.tags if t == 'img']
    assert len(images) == 4
    for o in images:
        assert base64.b64decode(o.split(',')[1])[:3] == b'\xff\xd8\xff'


def test_hostile_names_stay_names(pictures):
    tax, val, test = toy((*EVIL, 'owl', 'wren', 'tit'))
    steps = confidence_steps(val, test, tax, [0.5, 0.9])
    rows = [int((steps.targets == t).argmax()) for t in tax.index(list(EVIL))]
    page = confidence_slider(steps, dict(zip(rows, pictures)), title=EVIL[0])
    seen = Scripts(page)
    kinds = [t for t, _ in seen.tags]
    assert (
        kinds.count('script') == 1
        and kinds.count('img') == 3
        and 'b' not in [t for t, a in seen.tags if t == 'b' and 'class' not in a]
    )
    assert all('truth: ' + o in ''.join(seen.text) for o in EVIL)
    d = parts(page)
    assert {c[0]['name'] for c in d['cards']} <= set(tax.names) and {
        o for o in d['trace']['labels'] if '<' in o
    } == set()


def test_mistakes_are_named(pictures, tmp_path):
    tax, val, test = toy()
    steps = confidence_steps(val, test, tax, [0.5, 0.9])
    bad = tmp_path / 'bad.png'
    bad.write_text('no image')
    for images, words in (
        ({300: pictures[0]}, 'row 300'),
        ({0: bad}, 'bad.png'),
        ({0: tmp_path / 'none.png'}, 'none.png'),
    ):
        with pytest.raises(HiermetricError, match=words):
            confidence_slider(steps, images)
    for id in ('', '1x', 'a b', '"><script>'):
        with pytest.raises(HiermetricError, match='letters'):
            confidence_slider(steps, id=id)
    for c in [], [0.9, 0.8], [0.5, 0.5]:
        with pytest.raises(HiermetricError, match='rise'):
            confidence_steps(val, test, tax, c)


class Browser:
    "Headless Chromium on a pipe: one tab, commands of the DevTools protocol, what the console complained about"

    def __init__(self, folder):
        (r, self.to), (self.back, w) = os.pipe(), os.pipe()
        r, w = (fcntl.fcntl(o, fcntl.F_DUPFD, 20) for o in (r, w))
        flags = [
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            '--hide-scrollbars',
            '--disable-dev-shm-usage',
            '--remote-debugging-pipe',
            f'--user-data-dir={folder}',
            'about:blank',
        ]
        self.process = subprocess.Popen(
            ['bash', '-c', f'exec "$@" 3<&{r} 4>&{w}', 'bash', CHROMIUM, *flags],
            pass_fds=(r, w),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(r)
        os.close(w)
        self.rest, self.count, self.errors, self.session = b'', 0, [], None
        target = self.send('Target.createTarget', url='about:blank')['targetId']
        self.session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for o in 'Page', 'Runtime', 'Log':
            self.send(o + '.enable')

    def send(self, method, **params):
        self.count += 1
        os.write(
            self.to,
            json.dumps(
                {'id': self.count, 'method': method, 'params': params}
                | ({'sessionId': self.session} if self.session else {})
            ).encode()
            + b'\0',
        )
        end = time.monotonic() + 20
        while True:
            while b'\0' not in self.rest:
                assert select.select([self.back], [], [], max(end - time.monotonic(), 0))[0], (
                    f'Chromium does not answer {method}'
                )
                self.rest += (new := os.read(self.back, 1 << 20))
                assert new, f'Chromium ended at {method}'
            one, self.rest = self.rest.split(b'\0', 1)
            m = json.loads(one)
            p = m.get('params', {})
            if (
                m.get('method') == 'Runtime.exceptionThrown'
                or (m.get('method') == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'warning', 'assert'))
                or m.get('method') == 'Log.entryAdded'
            ):
                self.errors.append(p)
            if m.get('id') == self.count:
                assert 'error' not in m, m
                return m['result']

    def js(self, code):
        got = self.send('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in got, got
        return got['result'].get('value')

    def open(self, path, width, height=900):
        self.send(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.errors.clear()
        self.send('Page.navigate', url=path.as_uri())
        self.wait("document.readyState === 'complete'")

    def wait(self, code):
        end = time.monotonic() + 20
        while not self.js(code):
            assert time.monotonic() < end, f'never true: {code}'
            time.sleep(0.05)

    def key(self, key):  # pressed and let go
        for kind in 'keyDown', 'keyUp':
            self.send(
                'Input.dispatchKeyEvent',
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={'Tab': 9, 'End': 35, 'Home': 36, 'ArrowLeft': 37, 'ArrowRight': 39}[key],
            )

    def click(self, x, y):
        for kind in 'mouseMoved', 'mousePressed', 'mouseReleased':
            self.send(
                'Input.dispatchMouseEvent',
                type=kind,
                x=x,
                y=y,
                **({} if kind == 'mouseMoved' else {'button': 'left', 'clickCount': 1}),
            )

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot', captureBeyondViewport=True)['data']))

    def close(self):
        try:
            self.session = None
            self.send('Browser.close')
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip('no Chromium on this machine')
    b = Browser(tmp_path_factory.mktemp('profile'))
    yield b
    b.close()


def save(path, *args, **kw):  # a page that reads plotly.js from this machine instead of the net
    from plotly.offline import get_plotlyjs

    local = path.with_name('plotly.js')
    local.write_text(get_plotlyjs(), encoding='utf-8')
    page, n = re.subn(r'https://cdn[^"]*', local.as_uri(), confidence_slider(*args, title='Toy', **kw))
    assert n == 1
    path.write_text(page, encoding='utf-8')
    return path


DRAWN = "document.querySelectorAll('.rings path.surface').length > 0"
STATE = """(() => { const text = c => [...document.querySelectorAll(c)].map(o => o.textContent);
  const box = document.querySelector('.rings').getBoundingClientRect();
  const parts = '#confidence, #confidence > *, .figures > *, .both > *, .example, .example > *';
  const outside = o => o.getBoundingClientRect().right > innerWidth + .5 || o.scrollWidth > o.clientWidth + 1;
  return {asked: text('.asked')[0], spoken: document.querySelector('input').getAttribute('aria-valuetext'),
    figures: text('.figures b'), names: text('.name'), verdicts: text('.verdict'),
    kinds: [...document.querySelectorAll('.example')].map(o => o.className),
    colors: [...document.querySelectorAll('.rings path.surface')].map(o => o.style.fill),
    wide: [document.documentElement.scrollWidth, innerWidth], rings: [box.width, box.height],
    out: [...document.querySelectorAll(parts)].filter(outside).map(o => o.className)}; })()"""
WAIT = 'new Promise(f => requestAnimationFrame(() => setTimeout(f, 60)))'  # until plotly has drawn


def settled(browser):
    browser.js(WAIT)
    return browser.js(STATE)


@pytest.mark.parametrize('width', WIDTHS)
def test_it_moves(browser, pictures, tmp_path, width):
    tax, val, test = toy((EVIL[2], 'dog', 'bat', 'owl', 'wren', 'tit'))
    steps = confidence_steps(val, test, tax, CHANGES)
    shown = examples(steps, pictures)
    page = save(tmp_path / 'page.html', steps, shown)
    browser.open(page, width)
    browser.wait(DRAWN)
    browser.key('Tab')
    assert browser.js("document.activeElement.type") == 'range'  # the first stop of the keyboard
    browser.key('Home')
    states = [settled(browser)]
    for _ in range(4):
        browser.key('ArrowRight')
        states.append(settled(browser))
    for k, s in enumerate(states):
        row = steps.table.iloc[k]
        percent = lambda x: f'{100 * x:.1f} %'
        assert s['asked'] == s['spoken'] == percent(row.confidence)
        got = [float(o.split(' ')[0]) for o in s['figures']]
        np.testing.assert_allclose(
            got, [100 * row[c] for c in ('right', 'information kept', 'at a leaf', 'at the root')], atol=0.051
        )
        assert s['names'] == [tax.names[steps.nodes[k, i]] for i in shown]
        assert len(s['colors']) == len(tax) and s['wide'][0] <= s['wide'][1] == width and s['out'] == [], s
        assert min(s['rings']) > 250
    for a, b in zip(states, states[1:]):
        assert a['colors'] != b['colors'] and a['figures'] != b['figures']
    assert (
        len({tuple(s['names']) for s in states}) > 2
        and len({tuple(s['kinds']) for s in states}) > 2
        and len({tuple(s['verdicts']) for s in states}) > 2
    )
    assert (
        len(browser.js("[...document.querySelectorAll('.examples img')].map(o => o.naturalWidth).filter(o => o)")) == 4
    )
    assert browser.errors == []


def test_a_click_opens_a_branch_and_the_slider_keeps_it_open(browser, tmp_path):
    tax, val, test = toy()
    page = save(tmp_path / 'page.html', confidence_steps(val, test, tax, CHANGES))
    browser.open(page, 1200)
    browser.wait(DRAWN)
    full = "document.querySelectorAll('.rings path.surface').length"
    x, y = browser.js(
        "(() => { const p = [...document.querySelectorAll('.rings .slice')].find(o => "
        "o.textContent.includes('bird')).querySelector('text').getBoundingClientRect(); return [p.x + p.width/2, "
        "p.y + p.height/2]; })()"
    )
    assert browser.js(full) == 9
    browser.click(x, y)
    browser.wait(full + ' === 4')  # bird and its three
    browser.js(
        "(() => { const i = document.querySelector('input'); i.value = 4; i.dispatchEvent(new Event('input')); })()"
    )
    browser.js(WAIT)
    assert browser.js(full) == 4 and browser.errors == []


def test_hostile_names_do_nothing_in_a_browser(browser, pictures, tmp_path):
    tax, val, test = toy((*EVIL, 'owl', 'wren', 'tit'))
    steps = confidence_steps(val, test, tax, [0.5, 0.9])
    page = tmp_path / 'page.html'
    rows = [int((steps.targets == t).argmax()) for t in tax.index(list(EVIL))]
    page.write_text(confidence_slider(steps, dict(zip(rows, pictures)), title=EVIL[0], plotlyjs=True), encoding='utf-8')
    browser.open(page, 375)
    browser.wait(DRAWN)
    browser.key('Tab')
    browser.key('End')
    s = settled(browser)
    assert browser.js('window.hacked') is None and browser.errors == [] and s['out'] == [] and s['wide'][0] <= 375
    assert browser.js("document.title") == EVIL[0] and browser.js(
        "[...document.querySelectorAll('.truth')].map(o => o.textContent)"
    ) == ['truth: ' + o for o in EVIL]
    hover = browser.js("document.querySelector('.rings').data[0].labels")
    assert not any('<' in o for o in hover)


def test_without_plotly_the_rest_works(browser, pictures, tmp_path):
    tax, val, test = toy()
    steps = confidence_steps(val, test, tax, [0.5, 0.8, 0.99])
    page = tmp_path / 'page.html'
    page.write_text(
        confidence_slider(steps, examples(steps, pictures), title='Toy').replace(
            'https://cdn.plot.ly/', 'file:///nowhere/'
        ),
        encoding='utf-8',
    )
    browser.open(page, 375)
    browser.wait("document.querySelector('.rings').textContent.includes('left out')")
    browser.key('Tab')
    browser.key('Home')
    before = settled(browser)
    browser.key('End')
    after = settled(browser)
    assert (
        before['figures'] != after['figures']
        and before['names'] != after['names']
        and after['asked'] == '99.0 %'
        and after['out'] == []
    )
