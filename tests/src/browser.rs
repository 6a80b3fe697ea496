//! A headless browser, driven by opening pages, clicking and typing.
//!
//! Chromium is controlled by its DevTools protocol over a WebSocket: one JSON message per command, a response with the
//! same id, and events in between. Errors of pages (exceptions, content security policy violations) are recorded.

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
/// Read timeout of the WebSocket, far above any response time.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A browser with one tab; killed on drop.
pub struct Browser {
    process: Child,
    socket: WebSocket<MaybeTlsStream<TcpStream>>,
    session: String,
    commands: u64,
    errors: Vec<String>,
    _profile: TempDir,
}

/// Viewport and colour scheme.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    /// Width in CSS pixels.
    pub width: u32,
    /// Height in CSS pixels.
    pub height: u32,
    /// Preferred colour scheme: `light` or `dark`.
    pub scheme: &'static str,
}

impl Browser {
    /// Starts a browser. If none is installed, logs that the test named `test` is skipped and returns `None`.
    ///
    /// # Panics
    /// If none is installed and `CI=true`, or it does not start.
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
            .expect("an installed browser starts");
        let address = devtools_address(&profile.path().join("DevToolsActivePort"));
        let (socket, _) =
            tungstenite::connect(address).expect("the browser accepts a DevTools connection");
        if let MaybeTlsStream::Plain(stream) = socket.get_ref() {
            stream
                .set_read_timeout(Some(READ_TIMEOUT))
                .expect("a valid timeout");
        }
        let mut browser = Self {
            process,
            socket,
            session: String::new(),
            commands: 0,
            errors: Vec::new(),
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

    /// Sets the viewport and the colour scheme.
    pub fn set_screen(&mut self, screen: Screen) {
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

    /// Evaluates a JavaScript expression on the page.
    ///
    /// # Panics
    /// If it throws.
    #[track_caller]
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters =
            json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let response = self.call("Runtime.evaluate", &parameters);
        assert!(
            response.get("exceptionDetails").is_none(),
            "{expression}: {response}"
        );
        response["result"]["value"].clone()
    }

    /// Polls until the expression is true; an exception counts as false.
    ///
    /// # Panics
    /// If it is not true within the timeout.
    #[track_caller]
    pub fn until(&mut self, expression: &str) {
        let guarded =
            format!("(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()");
        wait_until(expression, || {
            (self.value(&guarded) == Value::Bool(true)).then_some(())
        });
    }

    /// Text of the first element that matches a selector; empty if there is none.
    #[track_caller]
    pub fn text(&mut self, selector: &str) -> String {
        let expression = format!("document.querySelector({selector:?})?.innerText ?? ''");
        self.value(&expression)
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// Clicks the centre of the first element that matches a selector.
    ///
    /// # Panics
    /// If there is no such element.
    #[track_caller]
    pub fn click(&mut self, selector: &str) {
        let centre = format!(
            "(() => {{ const e = document.querySelector({selector:?}); if (!e) return null;
              e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();
              return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
        );
        let centre = self.value(&centre);
        let [x, y] = [&centre[0], &centre[1]];
        assert!(x.is_number(), "no element matches {selector}");
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", &event);
        }
    }

    /// Inserts text at the cursor.
    pub fn type_text(&mut self, text: &str) {
        self.call("Input.insertText", &json!({"text": text}));
    }

    /// Presses and releases a key, given by name: `Enter`, `ArrowRight`.
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

    /// Screenshot of the viewport, a base64-encoded PNG.
    pub fn screenshot(&mut self) -> String {
        let response = self.call("Page.captureScreenshot", &json!({"format": "png"}));
        response["data"].as_str().unwrap_or_default().to_owned()
    }

    /// Errors of pages so far: exceptions and content security policy violations.
    pub fn errors(&self) -> &[String] {
        &self.errors
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
            let message: Value = serde_json::from_str(text).unwrap_or_default();
            if message["id"] == self.commands {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
            self.record_errors(&message);
        }
    }

    fn record_errors(&mut self, event: &Value) {
        let is_error = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Log.entryAdded") => event["params"]["entry"]["level"] == "error",
            _ => false,
        };
        if is_error {
            self.errors.push(event["params"].to_string());
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Errors mean that the browser has exited already.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// DevTools address, from the file that the browser writes.
fn devtools_address(file: &Path) -> String {
    let file: PathBuf = file.to_owned();
    wait_until("the DevTools address", || {
        let text = fs::read_to_string(&file).ok()?;
        let (port, path) = text.split_once('\n')?;
        path.starts_with('/')
            .then(|| format!("ws://127.0.0.1:{port}{}", path.trim()))
    })
}
