//! A real browser without a window, driven as a person would: it opens, clicks, types, and looks.
//!
//! Chromium speaks its DevTools protocol over a websocket: a JSON message a command, an answer with the
//! same id, and events in between. What a page did wrong (exceptions, refused by policy) is kept.

use std::{
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::{Message, WebSocket, stream::MaybeTlsStream};

use crate::{tool, wait_until};

const NAMES: [&str; 4] = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
];
/// No answer of a browser takes near so long.
const DEADLINE: Duration = Duration::from_secs(60);

/// A browser with one tab. It is ended when the value goes.
pub struct Browser {
    process: Child,
    socket: WebSocket<MaybeTlsStream<TcpStream>>,
    session: String,
    commands: u64,
    wrongs: Vec<String>,
    _profile: TempDir,
}

/// How a page is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    /// Width in CSS pixels.
    pub width: u32,
    /// Height in CSS pixels.
    pub height: u32,
    /// `light` or `dark`: what the system prefers.
    pub scheme: &'static str,
}

impl Browser {
    /// Starts one; `None` when there is none, and the test named `test` is skipped, aloud.
    ///
    /// # Panics
    /// When there is none and `CI=true`, or it does not start.
    pub fn start(test: &str) -> Option<Self> {
        let program = tool(test, &NAMES)?;
        let profile = TempDir::new().expect("a temporary directory");
        let process = Command::new(program)
            .args([
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            .args([
                "--no-first-run",
                "--remote-debugging-port=0",
                "--hide-scrollbars",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a browser that is installed starts");
        let address = address(&profile.path().join("DevToolsActivePort"));
        let (socket, _) = tungstenite::connect(address).expect("a browser lets itself be driven");
        if let MaybeTlsStream::Plain(stream) = socket.get_ref() {
            stream
                .set_read_timeout(Some(DEADLINE))
                .expect("a time to wait");
        }
        let mut browser = Self {
            process,
            socket,
            session: String::new(),
            commands: 0,
            wrongs: Vec::new(),
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", &json!({"url": "about:blank"}));
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = browser.call("Target.attachToTarget", &attach)["sessionId"].clone();
        browser.session = session.as_str().expect("a session has a name").to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(browser)
    }

    /// Looks at pages in this way from now on.
    pub fn look(&mut self, screen: Screen) {
        let Screen {
            width,
            height,
            scheme,
        } = screen;
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", &size);
        let scheme = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", &scheme);
    }

    /// Opens a page.
    pub fn open(&mut self, url: &str) {
        self.call("Page.navigate", &json!({"url": url}));
    }

    /// The value of an expression on the page.
    ///
    /// # Panics
    /// When it throws.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", &asked);
        assert!(
            answer.get("exceptionDetails").is_none(),
            "{expression}: {answer}"
        );
        answer["result"]["value"].clone()
    }

    /// Looks at the page until the expression is true; while it throws, it is not.
    ///
    /// # Panics
    /// When it has not been for minutes.
    #[track_caller]
    pub fn until(&mut self, expression: &str) {
        let tried =
            format!("(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()");
        wait_until(expression, || {
            (self.value(&tried) == Value::Bool(true)).then_some(())
        });
    }

    /// The text of the first element of a selector; empty when there is none.
    #[track_caller]
    pub fn text(&mut self, selector: &str) -> String {
        let asked = format!("document.querySelector({selector:?})?.innerText ?? ''");
        self.value(&asked).as_str().unwrap_or_default().to_owned()
    }

    /// Moves the pointer to the middle of the first element of a selector and clicks.
    ///
    /// # Panics
    /// When there is no such element.
    #[track_caller]
    pub fn click(&mut self, selector: &str) {
        let place = format!(
            "(() => {{ const e = document.querySelector({selector:?}); if (!e) return null;
              e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();
              return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
        );
        let place = self.value(&place);
        let [x, y] = [&place[0], &place[1]];
        assert!(x.is_number(), "there is no {selector} to click");
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", &event);
        }
    }

    /// Types a text where the cursor is.
    pub fn type_text(&mut self, text: &str) {
        self.call("Input.insertText", &json!({"text": text}));
    }

    /// Presses a key and lets it go, by its name: `Enter`, `ArrowRight`.
    pub fn press(&mut self, key: &str) {
        let text = if key == "Enter" { "\r" } else { "" };
        let code = match key {
            "Enter" => 13,
            "Tab" => 9,
            "ArrowLeft" => 37,
            "ArrowRight" => 39,
            _ => 0,
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let event = json!({"type": kind, "key": key, "code": key, "text": text, "windowsVirtualKeyCode": code});
            self.call("Input.dispatchKeyEvent", &event);
        }
    }

    /// A picture of what is seen, as a PNG in base 64.
    pub fn picture(&mut self) -> String {
        let answer = self.call("Page.captureScreenshot", &json!({"format": "png"}));
        answer["data"].as_str().unwrap_or_default().to_owned()
    }

    /// What pages did wrong so far: exceptions and what the policy of a page refused.
    pub fn wrongs(&self) -> &[String] {
        &self.wrongs
    }

    fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.commands += 1;
        let mut command = json!({"id": self.commands, "method": method, "params": parameters});
        if !self.session.is_empty() {
            command["sessionId"] = self.session.clone().into();
        }
        let sent = self.socket.send(Message::text(command.to_string()));
        sent.unwrap_or_else(|e| panic!("{method}: {e}"));
        loop {
            let message = self
                .socket
                .read()
                .unwrap_or_else(|e| panic!("{method}: {e}"));
            let Ok(text) = message.to_text() else {
                continue;
            };
            let answer: Value = serde_json::from_str(text).unwrap_or_default();
            if answer["id"] == self.commands {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.hear(&answer);
        }
    }

    fn hear(&mut self, event: &Value) {
        let is_wrong = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Log.entryAdded") => event["params"]["entry"]["level"] == "error",
            _ => false,
        };
        if is_wrong {
            self.wrongs.push(event["params"].to_string());
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A browser that has ended already is as good.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Where a browser says that it can be driven.
fn address(file: &Path) -> String {
    let file: PathBuf = file.to_owned();
    wait_until("the address of a browser", || {
        let text = fs::read_to_string(&file).ok()?;
        let (port, path) = text.split_once('\n')?;
        path.starts_with('/')
            .then(|| format!("ws://127.0.0.1:{port}{}", path.trim()))
    })
}
