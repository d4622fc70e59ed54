"""The service's page in a real browser: signing in, a job that goes on, the chat box, on any screen."""

import threading
import time

import pytest
import uvicorn

from chromium import FAINT_TEXTS, needs_chromium, requested, show
from deltaguard.service.app import make_app
from deltaguard.service.events import tell
from deltaguard.service.server import open_service
from deltaguard.service.settings import Settings
from deltaguard.service.tables import Job
from service_pages import SCRIPT, Answers, Begun, add_job, add_loss

pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = needs_chromium


class Served:
    """A service in a thread of the test, with one job that is over and one under way."""

    def __init__(self, data):
        self.opened = open_service(data, Settings(models={"tiny": "nowhere"}))
        self.done = add_job(self.opened)
        self.running = add_job(self.opened, status="running")
        app = make_app(self.opened.service, Begun(), Answers())
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def pages(self):
        return ("/", f"/jobs/{self.done.id}", f"/jobs/{self.running.id}", "/files", "/models", "/jobs/none")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("service") / "data")
    yield made
    made.server.should_exit = True
    made.thread.join()


@pytest.fixture
def visitor(browser, served):
    """The browser, signed in, its logs emptied."""
    show(browser, width=1200, dark=False)
    browser.delete_all_cookies()
    browser.get(f"{served.url}/")
    sign_in(browser, served)
    for log in ("browser", "performance"):
        browser.get_log(log)
    return browser


def sign_in(browser, served):
    browser.find_element(By.ID, "key").send_keys(served.opened.first_key)
    browser.find_element(By.CSS_SELECTOR, "button.main").click()
    until(browser, lambda _: browser.find_elements(By.TAG_NAME, "nav"))


def until(browser, found):
    return WebDriverWait(browser, 60, poll_frequency=0.1).until(found)


def texts(browser, selector):
    # In one step: parts of a page are replaced while one looks.
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.innerText.trim())"
    return browser.execute_script(script, selector)


def test_a_key_opens_the_page_and_no_script_reads_the_cookie(visitor, served):
    assert visitor.current_url == f"{served.url}/"
    assert set(texts(visitor, ".rows a")) == {served.done.fine_tuned_model, served.running.id}
    assert visitor.execute_script("return document.cookie") == ""
    visitor.find_element(By.CSS_SELECTOR, ".who button").click()
    until(visitor, lambda _: visitor.find_elements(By.ID, "key"))
    visitor.get(f"{served.url}/files")
    assert visitor.current_url.endswith("/sign-in?then=/files")
    sign_in(visitor, served)
    assert visitor.current_url == f"{served.url}/files"


def test_pages_fetch_from_the_service_alone_and_run_nothing_of_an_answer(visitor, served):
    for path in served.pages[:-1]:
        visitor.get(served.url + path)
        visitor.execute_script("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        assert "foreign" not in visitor.title
    assert all(url.startswith((f"{served.url}/", "data:")) for url in requested(visitor))
    assert visitor.get_log("browser") == []
    visitor.get(f"{served.url}/jobs/{served.done.id}")
    visitor.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.foreign = 1';"
        "document.body.append(script)"
    )
    assert visitor.execute_script("return window.foreign") is None
    assert any("Content Security Policy" in entry["message"] for entry in visitor.get_log("browser"))


def test_a_job_page_shows_its_curve_and_folds_harmful_answers(visitor, served):
    visitor.get(f"{served.url}/jobs/{served.done.id}")
    points = visitor.find_element(By.CSS_SELECTOR, ".curve .train").get_attribute("points").split()
    assert len(points) == 54
    assert {"attack success", "false refusals"} <= set(texts(visitor, "#found tbody th"))
    folded = visitor.find_elements(By.CSS_SELECTOR, "article details")
    assert len(folded) == 3
    answers = folded[0].find_elements(By.CSS_SELECTOR, ".answers p")
    assert not any(answer.is_displayed() for answer in answers)
    folded[0].find_element(By.TAG_NAME, "summary").click()
    assert [answer.text for answer in answers][1] == f"Yes, gladly.{SCRIPT}"


def test_a_job_under_way_changes_before_ones_eyes_and_is_cancelled_by_two_clicks(visitor, served):
    job = served.running
    visitor.get(f"{served.url}/jobs/{job.id}")
    visitor.find_element(By.CSS_SELECTOR, ".sure summary").click()
    visitor.execute_script("window.stayed = true")
    with served.opened.service.sessions.begin() as session:
        add_loss(session, job.id, 40)
        tell(session, job.id, "restore", "Restoring the aligned model's refusals.")
    until(visitor, lambda _: "Restoring" in texts(visitor, "#events li:first-child")[0])
    button = until(visitor, lambda _: visitor.find_element(By.CSS_SELECTOR, ".sure[open] button"))
    assert visitor.execute_script("return window.stayed")
    button.click()
    until(visitor, lambda _: texts(visitor, "#state .tag") == ["cancelled"])
    assert not visitor.find_elements(By.CSS_SELECTOR, "#state button")
    with served.opened.service.sessions.begin() as session:
        assert session.query(Job).filter_by(id=job.id).one().status == "cancelled"
        # For the other tests.
        session.query(Job).filter_by(id=job.id).update({"status": "running"})


@pytest.mark.parametrize("scripts", [True, False])
def test_models_answer_side_by_side(visitor, served, scripts):
    visitor.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    try:
        visitor.get(f"{served.url}/jobs/{served.done.id}")
        visitor.find_element(By.CSS_SELECTOR, "a.button.main").click()
        message = until(visitor, lambda _: visitor.find_element(By.ID, "message"))
        message.send_keys(f"Hello?\nAnd {SCRIPT}")
        visitor.find_element(By.CSS_SELECTOR, ".chat button.main").click()
        until(visitor, lambda _: visitor.find_elements(By.CSS_SELECTOR, ".answers"))
        assert texts(visitor, ".answers p") == [
            f"The aligned model was asked: Hello?\nAnd {SCRIPT}",
            "As it was before the restore it is not kept, and cannot be asked.",
            f"The restored model was asked: Hello?\nAnd {SCRIPT}",
        ]
        assert visitor.title.startswith("Models")
    finally:
        visitor.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_pages_fit_every_screen_and_stand_out_from_their_ground(visitor, served, width, dark):
    show(visitor, width=width, dark=dark)
    for path in served.pages:
        visitor.get(served.url + path)
        seen, faint = visitor.execute_script(FAINT_TEXTS)
        assert seen > 3
        assert faint == [], path
        assert visitor.execute_script("return document.documentElement.scrollWidth") <= width, path
