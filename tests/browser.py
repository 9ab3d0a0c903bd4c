"""Trigger a DAG from Airflow's form in Chromium, as a person does, and wait until the page says how the run ended.

A program of its own: what drives the browser is in tests/.venv. Arguments: Airflow's URL, the file of its passwords, the DAG,
and one `name=value` for each parameter that is typed in. Prints the state of the run that the page shows.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

PAGE_TIMEOUT_S = 120
RUN_TIMEOUT_S = 600
INSTALL = "Debian's chromium must be installed for this test: apt-get install chromium"


def sign_in(page: Page, url: str, password: str) -> None:
    page.goto(url)
    page.fill("input[name=username]", "admin")
    page.fill("input[name=password]", password)
    page.get_by_role("button", name="Sign in").click()


def trigger(page: Page, parameters: dict[str, str]) -> None:
    page.get_by_role("button", name="Trigger Dag").click()
    form = page.get_by_role("dialog")
    for name, value in parameters.items():
        field = form.locator(f"input[name=element_{name}]")
        field.fill(value)
        field.press("Tab")
    with page.expect_response(lambda answer: answer.request.method == "POST" and answer.url.endswith("/dagRuns")) as answered:
        form.get_by_role("button", name="Trigger", exact=True).click()
    if not answered.value.ok:
        sys.exit(f"Airflow refused the run: {answered.value.status} {answered.value.text()}")


def final_state(page: Page, url: str) -> str:
    """Follow the list of runs until the newest one has ended."""
    page.goto(f"{url}/runs")
    ended = page.get_by_role("row").get_by_text(re.compile("^(Success|Failed)$"))
    expect(ended.first).to_be_visible(timeout=RUN_TIMEOUT_S * 1000)
    return str(ended.first.inner_text())


def main() -> None:
    airflow, passwords, dag, *typed = sys.argv[1:]
    program = shutil.which("chromium")
    if program is None:
        sys.exit(INSTALL)
    url = f"{airflow}/dags/{dag}"
    with sync_playwright() as playwright:
        # Debian's Chromium will not run as root with a sandbox of its own; it opens nothing but Airflow's pages.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PAGE_TIMEOUT_S * 1000)
        sign_in(page, url, json.loads(Path(passwords).read_text())["admin"])
        trigger(page, dict(pair.split("=", 1) for pair in typed))
        print(final_state(page, url))
        browser.close()


if __name__ == "__main__":
    main()
