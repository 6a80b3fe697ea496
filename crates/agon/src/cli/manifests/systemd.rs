//! systemd units of the roles.

use settings::Settings;

use super::{FINAL_CODES, INTERRUPTED_CODE, STOP_TIMEOUT};

/// Restrictions of every unit: a process reads its configuration and model files, writes below /var/lib/agon, and
/// uses the network.
const SANDBOX: &str = "\
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
PrivateTmp=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
";

/// A unit of a role.
struct Unit<'a> {
    /// File name.
    file: String,
    role: &'a str,
    /// Arguments after the configuration.
    extra: String,
    /// `Restart=`: the learner ends with the run, the others wait for the next one.
    restart: &'a str,
}

/// The units of all roles, each after a comment with its file name.
pub(super) fn units(settings: &Settings) -> String {
    let name = &settings.run.name;
    let units = [
        Unit {
            file: format!("agon-{name}-learner.service"),
            role: "learner",
            extra: format!(" --run-dir /var/lib/agon/{name} --resume=auto"),
            restart: "on-failure",
        },
        Unit {
            file: format!("agon-{name}-actor@.service"),
            role: "actor",
            extra: String::new(),
            restart: "always",
        },
        Unit {
            file: format!("agon-{name}-preference@.service"),
            role: "preference",
            extra: String::new(),
            restart: "always",
        },
    ];
    let devices = devices(settings);
    units.iter().map(|unit| unit.text(name, devices)).collect()
}

/// Access to devices: none but the pseudo-devices, unless the model runs on a GPU.
fn devices(settings: &Settings) -> &'static str {
    match settings.model.device.as_str() {
        "cpu" => "PrivateDevices=yes\n",
        _ => "",
    }
}

impl Unit<'_> {
    fn text(&self, name: &str, devices: &str) -> String {
        let Self {
            file,
            role,
            extra,
            restart,
        } = self;
        let [refused, diverged] = FINAL_CODES;
        format!(
            "# {file}\n\
             # The user: useradd --system --home-dir /var/lib/agon --shell /usr/sbin/nologin agon\n\
             # It must be able to read the configuration and the files that it names; no one else needs to.\n\
             [Unit]\n\
             Description=Agon {role} of the run {name}\n\
             After=network-online.target nats-server.service\n\
             Wants=network-online.target\n\
             # A server that is away for hours is no reason to give up.\n\
             StartLimitIntervalSec=0\n\n\
             [Service]\n\
             Type=exec\n\
             User=agon\n\
             Group=agon\n\
             UMask=0077\n\
             ExecStart=/usr/local/bin/agon {role} /etc/agon/{name}.toml{extra}\n\
             WorkingDirectory=/var/lib/agon\n\
             StateDirectory=agon\n\
             StateDirectoryMode=0700\n\
             Environment=HF_HOME=/var/lib/agon/huggingface\n\
             Restart={restart}\n\
             RestartSec=5\n\
             # A rejected configuration and a diverged run stay as they are; a missing resource, such as the server,\n\
             # may come back.\n\
             RestartPreventExitStatus={refused} {diverged}\n\
             SuccessExitStatus={INTERRUPTED_CODE}\n\
             TimeoutStopSec={STOP_TIMEOUT}\n\
             LimitNOFILE=65536\n\
             {SANDBOX}{devices}\n\
             [Install]\n\
             WantedBy=multi-user.target\n\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use settings::resolve;

    use super::*;

    fn of(text: &str) -> String {
        let resolved = resolve(text, "test", &[]).expect("they are valid");
        units(&resolved.settings)
    }

    #[test]
    fn units_restart_after_an_outage_and_not_after_a_final_failure() {
        let units = of("[run]\nname = \"x\"\n");
        assert_eq!(units.matches("[Service]").count(), 3);
        assert_eq!(units.matches("\nRestartPreventExitStatus=2 4\n").count(), 3);
        assert_eq!(units.matches("\nStartLimitIntervalSec=0\n").count(), 3);
        assert!(
            units.contains("agon learner /etc/agon/x.toml --run-dir /var/lib/agon/x --resume=auto")
        );
    }

    #[test]
    fn units_run_without_privileges() {
        let units = of("[run]\nname = \"x\"\n");
        for line in [
            "User=agon",
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "PrivateDevices=yes",
        ] {
            assert_eq!(units.matches(&format!("\n{line}\n")).count(), 3, "{line}");
        }
        let cuda = of("[run]\nname = \"x\"\n[model]\ndevice = \"cuda\"\n");
        assert!(!cuda.contains("PrivateDevices"), "{cuda}");
    }
}
