//! The live page in a real browser.

use std::{fs, path::Path};

use serde_json::{Value, json};
use system_tests::{Browser, RunningProcess, Sandbox, Screen, steps, tiny_playground};

const DESKTOP: Screen = Screen {
    width: 1280,
    height: 900,
    scheme: "light",
};

const PHONE: Screen = Screen {
    width: 390,
    height: 844,
    scheme: "dark",
};

/// Starts `agon view` on these runs; returns the process and its address.
fn view(sandbox: &Sandbox, runs: &[&Path]) -> (RunningProcess, String) {
    let runs: Vec<_> = runs.iter().map(|run| run.display().to_string()).collect();
    view_with(
        sandbox,
        &runs.iter().map(String::as_str).collect::<Vec<_>>(),
    )
}

/// Starts `agon view` with these arguments; returns the process and its address.
fn view_with(sandbox: &Sandbox, arguments: &[&str]) -> (RunningProcess, String) {
    let arguments = [&["view"], arguments].concat();
    let mut running = sandbox.start(&arguments);
    let [stdout, _] = running.output_files();
    let url = running.until("the address of the page", || {
        let text = fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    (running, url)
}

/// Address that a run logs for its `page` or its `metrics`.
fn logged_address(running: &mut RunningProcess, what: &str) -> String {
    let [_, stderr] = running.output_files();
    running.until("an address", || {
        let text = fs::read_to_string(&stderr).ok()?;
        let (_, rest) = text.split_once(&format!("{what}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    })
}

fn assert_no_errors(browser: &Browser) {
    assert!(browser.errors().is_empty(), "{:#?}", browser.errors());
}

/// Writes the files of a finished run: curves, and these samples.
fn fake_run(sandbox: &Sandbox, name: &str, rows: &[Value]) -> std::path::PathBuf {
    let run = sandbox.path(name);
    fs::create_dir_all(&run).expect("a folder in the sandbox");
    let lines = |rows: &[Value]| {
        rows.iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>()
    };
    let metrics: Vec<_> = (1..=50)
        .map(|step| json!({"step": step, "wall_seconds": step, "loss": 1.0 / f64::from(step)}))
        .collect();
    fs::write(run.join("metrics.jsonl"), lines(&metrics)).expect("a file");
    fs::write(run.join("samples.jsonl"), lines(rows)).expect("a file");
    fs::write(
        run.join("config.toml"),
        format!("[run]\nname = {name:?}\nseed = 0\n"),
    )
    .expect("a file");
    run
}

fn row(step: u32, prompt: &str, text: &str) -> Value {
    json!({
        "step": step, "prompt_id": step, "purpose": "train", "version": 1, "prompt": prompt,
        "completions": [text, "another"], "lengths": [2, 1], "finish": ["end_of_text", "length"],
        "p": 0.9, "gold": null, "judge": "rule", "judge_version": 1,
        "sum_logp": [-2.0, -1.0], "sum_ref_logp": [-4.0, -1.0],
        "tokens": [[text, ""], ["another"]], "logp": [[-1.0, -1.0], [-1.0]],
        "ref_logp": [[-3.0, -1.0], [-0.7]],
    })
}

#[test]
fn the_page_follows_a_live_run() {
    let Some(mut browser) = Browser::start("the_page_follows_a_live_run") else {
        return;
    };
    let sandbox = Sandbox::new();
    let run = sandbox.path("watched");
    let sets = [
        "learner.steps=100000",
        "evaluation.eval_steps=5",
        "telemetry.samples_per_step=2",
    ];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    let url = logged_address(&mut running, "page");
    browser.set_screen(DESKTOP);
    browser.open(&url);
    browser.until("document.querySelector('#link')?.textContent === 'live'");
    browser.until("document.querySelector('[data-chart=\"Loss\"] path.stroke')?.getAttribute('d').length > 20");
    browser.until("document.querySelector('[data-chart=\"Win rate\"] path.band') !== null");
    assert!(
        browser.text("#runs").contains("watched running"),
        "{}",
        browser.text("#runs")
    );
    let before = browser.text("#runs");
    browser.until(&format!(
        "document.querySelector('#runs').innerText !== {before:?}"
    ));

    browser.click("#tab-flow");
    browser.until("document.querySelectorAll('#pipeline [data-stage]').length === 3");
    browser.until(
        "/received [1-9]/.test(document.querySelector('[data-stage=learner]')?.textContent)",
    );

    browser.click("#tab-samples");
    browser.until("document.querySelectorAll('#rows article').length > 3");
    browser.until("document.querySelectorAll('#rows .token[title^=\"log\"]').length > 20");
    browser.until("!document.querySelector('#fresh').hidden");
    let newest = "Number(document.querySelector('#rows article').dataset.number)";
    let before = browser.value(newest);
    browser.click("#fresh");
    browser.until(&format!("{newest} > {before}"));
    assert_no_errors(&browser);

    // The same data, shown by another process that polls this one.
    let metrics = logged_address(&mut running, "metrics");
    let path = run.display().to_string();
    let (viewer, url) = view_with(&sandbox, &[&path, "--metrics", &metrics]);
    browser.open(&format!("{url}#flow"));
    browser
        .until("/received [1-9]/.test(document.querySelector('[data-stage=actor]').textContent)");
    assert_no_errors(&browser);
    viewer.terminate();
    viewer.wait().succeeded();

    browser.open(&format!("{}#flow", logged_address(&mut running, "page")));
    browser.until("document.querySelector('#link').textContent === 'live'");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    browser.until("document.querySelector('#link').textContent.startsWith('no connection')");
    assert!(steps(&run).len() > 5);
}

/// The lines of a JSON Lines file of a run.
fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the file was written");
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    lines.collect()
}

#[test]
fn a_person_judges_pairs_and_nothing_is_lost() {
    let Some(mut browser) = Browser::start("a_person_judges_pairs_and_nothing_is_lost") else {
        return;
    };
    let sandbox = Sandbox::new();
    // The judge is least certain about the third pair, then about the first; the last one has equal completions.
    let rows: Vec<_> = [(1, 0.8), (2, 0.1), (3, 0.45), (4, 0.5)]
        .into_iter()
        .map(|(step, p)| {
            let text = if step == 4 { "another" } else { "an answer" };
            let mut row = row(step, &format!("question {step}"), text);
            row["p"] = json!(p);
            row["judge_p"] = json!(p);
            row
        })
        .collect();
    let run = fake_run(&sandbox, "judged", &rows);
    let (viewer, url) = view(&sandbox, &[&run]);
    browser.set_screen(DESKTOP);
    browser.open(&format!("{url}#verdicts"));
    let shown = |step: u32| {
        format!("document.querySelector('#pair [data-step]').dataset.step === '{step}'")
    };
    browser.until(&shown(3));
    // Neither the judge's label nor its name is shown.
    let text = browser.text("#pair");
    assert!(
        text.contains("question 3") && !text.contains("rule"),
        "{text}"
    );
    let left = browser.text("#pair .side:first-of-type .text");
    let key = if left == "an answer" { "1" } else { "2" };
    browser.press(key);
    browser.until(&shown(1));
    browser.click("[data-verdict=tie]");
    browser.until(&shown(2));
    browser.press("b");
    browser.until("document.querySelector('#pair').innerText.startsWith('No pair is left')");
    browser.press("u");
    browser.until(&shown(2));
    assert_no_errors(&browser);
    viewer.terminate();
    viewer.wait().succeeded();

    // Another page shows what the first one wrote.
    let (viewer, url) = view(&sandbox, &[&run]);
    browser.open(&format!("{url}#verdicts"));
    browser.until("document.querySelector('#verdict-status').textContent.startsWith('2 verdicts: 1 decided, 1 equal, 0 both bad.')");
    let status = browser.text("#verdict-status");
    // The person preferred the first completion of the third pair, the judge the second.
    assert!(
        status.contains("Agreement with the judge: 0.0 % (0.0 % to 79.3 %) of 1"),
        "{status}"
    );
    assert!(status.contains("at random: none yet"), "{status}");
    browser.until(&shown(2));
    let pairs = json_lines(&run.join("annotated_pairs.jsonl"));
    let expected = json!({"prompt": "question 3", "chosen": "an answer", "rejected": "another"});
    assert_eq!(pairs, [expected]);
    let journal = json_lines(&run.join("verdicts.jsonl"));
    let kinds: Vec<_> = journal.iter().map(|line| &line["line"]).collect();
    assert_eq!(kinds, ["verdict", "verdict", "verdict", "withdrawn"]);
    viewer.terminate();
    viewer.wait().succeeded();
}

#[test]
fn runs_are_overlaid_and_their_settings_compared() {
    let Some(mut browser) = Browser::start("runs_are_overlaid_and_their_settings_compared") else {
        return;
    };
    let sandbox = Sandbox::new();
    let [one, two] = ["one", "two"].map(|name| fake_run(&sandbox, name, &[row(1, "p", "t")]));
    for (run, stop) in [(&one, 1), (&two, 2)] {
        let line = json!({"step": 50, "wall_seconds": 50, "eval/win_rate": 0.5, "conditions": {"stop_ids": [stop]}});
        let lines = fs::read_to_string(run.join("metrics.jsonl")).expect("the file was written");
        fs::write(run.join("metrics.jsonl"), format!("{lines}{line}\n")).expect("a file");
    }
    let (running, url) = view(&sandbox, &[&one, &two]);
    browser.set_screen(DESKTOP);
    browser.open(&url);
    let lines =
        "document.querySelectorAll('[data-chart=\"Loss\"] svg[role=img] path.stroke').length";
    browser.until(&format!("{lines} === 2"));
    let differences = browser.text("#differences");
    assert!(
        differences.contains("stop_ids: [1] in one, [2] in two"),
        "{differences}"
    );
    browser.click("[data-run=\"1\"]");
    browser.until(&format!("{lines} === 1"));
    browser.click("[data-run=\"1\"]");

    // Keyboard navigation along the tabs and along a curve.
    browser.click("#tab-curves");
    browser.value("document.querySelector('[data-chart=\"Loss\"] svg[role=img]').focus()");
    for _ in 0..2 {
        browser.press("ArrowLeft");
    }
    let label = browser.text("[data-chart=\"Loss\"] output");
    assert!(label.contains("one loss 0.021 at step 48"), "{label}");
    browser.value("document.querySelector('#tab-curves').focus()");
    for _ in 0..5 {
        browser.press("ArrowRight");
    }
    browser
        .until("document.querySelector('#tab-settings').getAttribute('aria-selected') === 'true'");
    browser.until("document.querySelectorAll('main tr.differs').length === 1");
    browser.click("#differing");
    browser.until("document.querySelectorAll('main tbody tr').length === 1");
    assert!(
        browser.text("main tbody").contains("run.name"),
        "{}",
        browser.text("main tbody")
    );

    // The skip link keeps the current view.
    browser.value("document.querySelector('.skip').click()");
    browser.until("location.hash === '#view'");
    browser
        .until("document.querySelector('#tab-settings').getAttribute('aria-selected') === 'true'");

    browser.click("#theme");
    browser.click("#theme");
    assert_eq!(
        browser.value("document.documentElement.dataset.theme"),
        "dark"
    );
    assert_no_errors(&browser);
    running.terminate();
    running.wait().succeeded();
}

#[test]
fn markup_in_texts_is_shown_and_not_executed() {
    let Some(mut browser) = Browser::start("markup_in_texts_is_shown_and_not_executed") else {
        return;
    };
    let sandbox = Sandbox::new();
    let hostile = [
        "<script>window.hit = 1</script>",
        "<img src=x onerror=\"window.hit = 1\">",
        "</div><svg onload=window.hit=1>",
        "\" onmouseover=\"window.hit=1",
        "javascript:window.hit=1",
    ];
    let rows: Vec<_> = (1..)
        .zip(hostile)
        .map(|(step, text)| row(step, text, text))
        .collect();
    let name = "<img src=x onerror=window.hit=1>";
    let run = fake_run(&sandbox, name, &rows);
    let (running, url) = view(&sandbox, &[&run]);
    browser.set_screen(DESKTOP);
    browser.open(&format!("{url}#samples"));
    browser.until(&format!(
        "document.querySelectorAll('#rows article').length === {}",
        hostile.len()
    ));
    for (step, text) in (1..).zip(hostile) {
        let index = hostile.len() - step;
        let shown = format!(
            "document.querySelectorAll('#rows article')[{index}].querySelector('.prompt').textContent"
        );
        assert_eq!(browser.value(&shown), text);
    }
    for tab in ["curves", "flow", "rounds", "settings"] {
        browser.click(&format!("#tab-{tab}"));
    }
    browser.until("document.querySelector('main').innerText.includes('onerror=window.hit')");
    assert_eq!(browser.value("window.hit === undefined"), true);
    assert_eq!(
        browser.value("document.querySelectorAll('main img, main script').length"),
        0
    );
    assert_no_errors(&browser);
    running.terminate();
    running.wait().succeeded();
}

#[test]
fn a_hundred_thousand_samples_can_be_browsed_on_a_phone() {
    let Some(mut browser) = Browser::start("a_hundred_thousand_samples_can_be_browsed_on_a_phone")
    else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows: Vec<_> = (1..=100_000)
        .map(|step| row(step, &format!("prompt {step}"), "text"))
        .collect();
    let run = fake_run(&sandbox, "many", &rows);
    let (running, url) = view(&sandbox, &[&run]);
    browser.set_screen(PHONE);
    browser.open(&format!("{url}#samples"));
    browser.until("document.querySelector('#count').textContent.startsWith('20 shown of 100000')");
    assert_eq!(
        browser.value("document.querySelectorAll('#rows .token.u3').length"),
        20
    );
    browser.click("#older");
    browser.until("document.querySelector('#count').textContent.startsWith('40 shown of 100000')");
    browser.click("#last_step");
    browser.type_text("50000");
    browser.click("#find");
    browser.until("document.querySelector('#rows article')?.dataset.number === '49999'");
    browser.click("#search");
    browser.type_text("PROMPT 123");
    browser.press("Enter");
    // The matches are among the oldest rows: 123, 1230 to 1239, and so on.
    browser.until("document.querySelectorAll('#rows article').length === 20");
    let all = "[...document.querySelectorAll('#rows .prompt')].every((p) => p.textContent.startsWith('prompt 123'))";
    assert_eq!(browser.value(all), true);
    // The page does not scroll horizontally.
    assert_eq!(
        browser.value("document.documentElement.scrollWidth <= innerWidth"),
        true
    );
    for tab in ["curves", "flow", "rounds", "settings"] {
        browser.click(&format!("#tab-{tab}"));
        assert_eq!(
            browser.value("document.documentElement.scrollWidth <= innerWidth"),
            true,
            "{tab}"
        );
    }
    assert_no_errors(&browser);
    running.terminate();
    running.wait().succeeded();
}

#[test]
fn extreme_values_and_many_names_do_not_hang_the_page() {
    let Some(mut browser) = Browser::start("extreme_values_and_many_names_do_not_hang_the_page")
    else {
        return;
    };
    let sandbox = Sandbox::new();
    let run = fake_run(&sandbox, "extreme", &[row(1, "p", "t")]);
    let names: String = (0..50_000).map(|n| format!(",\"m{n}\":1e308")).collect();
    let mut lines = format!("{{\"step\":1,\"loss\":1e308,\"eval/kl\":1e16{names}}}\n");
    lines += "{\"step\":2,\"loss\":-1e308,\"eval/kl\":10000000000000002}\n";
    lines += "{\"step\":3,\"loss\":5e-324,\"objective/entropy\":1e308}\n";
    fs::write(run.join("metrics.jsonl"), lines).expect("a file");
    let (running, url) = view(&sandbox, &[&run]);
    browser.set_screen(DESKTOP);
    browser.open(&url);
    for chart in ["Loss", "KL", "Entropy"] {
        browser.until(&format!(
            "document.querySelector('[data-chart={chart:?}] path.stroke') !== null"
        ));
    }
    let path = browser
        .value("document.querySelector('[data-chart=\"Loss\"] path.stroke').getAttribute('d')");
    assert!(!path.to_string().contains("NaN"), "{path}");
    let figures = browser.text(".figures");
    assert!(figures.contains("values of too many metrics"), "{figures}");
    assert_eq!(
        // 1000, the prompt, and what Agon itself names beyond the limit.
        browser.value("document.querySelector('#more').options.length <= 1002"),
        true
    );
    assert_no_errors(&browser);
    running.terminate();
    running.wait().succeeded();
}
