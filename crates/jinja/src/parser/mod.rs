//! Parser: tokens to statements.

mod expressions;

use std::sync::Arc;

use crate::{
    ast::{
        ArgumentList, AssignTarget, Expression, Filter, For, If, Macro, Statement, StatementKind,
        Takes,
    },
    error::TemplateError,
    lexer::{self, LocatedToken, TemplateToken},
    limits,
};

/// Maximum number of operators, filters and attributes per tag; each may add one level to the tree.
const MAX_OPERATORS: usize = 300;
/// Maximum nesting depth of blocks and expressions.
const MAX_DEPTH: usize = 60;

/// Parses a template.
pub(crate) fn parse(source: &str) -> Result<Vec<Statement>, TemplateError> {
    let mut parser = Parser {
        tokens: lexer::tokens(source)?,
        position: 0,
        depth: 0,
        links: MAX_OPERATORS,
        loops: 0,
        fors: 0,
        takes: Takes::default(),
    };
    let body = parser.statements(&[])?;
    Ok(body)
}

struct Parser {
    tokens: Vec<LocatedToken>,
    position: usize,
    depth: usize,
    /// Remaining number of operators, filters and attributes in the current tag.
    links: usize,
    /// Number of enclosing loops that `break` can leave.
    loops: usize,
    /// Number of all enclosing loops, inside which `loop` cannot be assigned.
    fors: usize,
    /// Special variables used so far in the current macro.
    takes: Takes,
}

impl Parser {
    fn token(&self) -> &TemplateToken {
        &self.tokens[self.position].token
    }

    fn line(&self) -> usize {
        self.tokens[self.position].line
    }

    fn peek(&self) -> &TemplateToken {
        let next = (self.position + 1).min(self.tokens.len() - 1);
        &self.tokens[next].token
    }

    fn failure(&self, message: impl Into<String>) -> TemplateError {
        TemplateError::new(message).at(self.line())
    }

    fn next(&mut self) -> TemplateToken {
        let token = self.token().clone();
        self.position = (self.position + 1).min(self.tokens.len() - 1);
        token
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.token(), TemplateToken::Name(found) if found == name)
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.token(), TemplateToken::Operator(found) if *found == operator)
    }

    /// Consumes the next token if it is this name.
    fn takes_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    /// Consumes the next token if it is this operator.
    fn takes_operator(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        if found {
            self.next();
        }
        found
    }

    fn expect(&mut self, token: &TemplateToken) -> Result<(), TemplateError> {
        if self.token() == token {
            self.next();
            return Ok(());
        }
        let (expected, found) = (token.describe(), self.token().describe());
        Err(self.failure(format!("expected token '{expected}', got '{found}'")))
    }

    fn expect_operator(&mut self, operator: &'static str) -> Result<(), TemplateError> {
        self.expect(&TemplateToken::Operator(operator))
    }

    fn expect_name(&mut self, name: &str) -> Result<(), TemplateError> {
        self.expect(&TemplateToken::Name(name.to_owned()))
    }

    fn name(&mut self) -> Result<String, TemplateError> {
        match self.token() {
            TemplateToken::Name(name) => {
                let name = name.clone();
                self.next();
                Ok(name)
            }
            other => {
                let found = other.describe();
                Err(self.failure(format!("expected token 'name', got '{found}'")))
            }
        }
    }

    /// Counts an operator, a filter or an attribute against the limit.
    fn count_operator(&mut self) -> Result<(), TemplateError> {
        let left = self.links.checked_sub(1);
        let message = format!("more than {MAX_OPERATORS} operators in a tag");
        self.links = left.ok_or_else(|| self.failure(message))?;
        Ok(())
    }

    /// Parses one nesting level deeper.
    fn deeper<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, TemplateError>,
    ) -> Result<T, TemplateError> {
        if self.depth == MAX_DEPTH {
            return Err(self.failure(format!("the template is nested more than {MAX_DEPTH} deep")));
        }
        self.depth += 1;
        let parsed = limits::with_stack(|| parse(self));
        self.depth -= 1;
        parsed
    }

    /// Parses statements up to a tag named in `ends`, which is not consumed, or to the end of the template if `ends` is
    /// empty.
    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Statement>, TemplateError> {
        let mut body = Vec::new();
        loop {
            self.links = MAX_OPERATORS;
            let line = self.line();
            let kind = match self.token() {
                TemplateToken::Data(text) => {
                    let text = text.clone();
                    self.next();
                    StatementKind::Text(text)
                }
                TemplateToken::VariableBegin => {
                    self.next();
                    let printed = self.tuple()?;
                    self.expect(&TemplateToken::VariableEnd)?;
                    StatementKind::Print(printed)
                }
                TemplateToken::BlockBegin => {
                    self.next();
                    if ends.iter().any(|end| self.is_name(end)) {
                        return Ok(body);
                    }
                    let line = self.line();
                    let kinds = self.deeper(Self::statement)?;
                    self.expect(&TemplateToken::BlockEnd)?;
                    body.extend(kinds.into_iter().map(|kind| Statement { line, kind }));
                    continue;
                }
                TemplateToken::End if ends.is_empty() => return Ok(body),
                TemplateToken::End => {
                    let wanted = ends.join(" or ");
                    return Err(
                        self.failure(format!("unexpected end of template, looking for {wanted}"))
                    );
                }
                other => {
                    let found = other.describe();
                    return Err(self.failure(format!("unexpected '{found}'")));
                }
            };
            body.push(Statement { line, kind });
        }
    }

    /// Parses the body of a block up to a tag of `ends`; returns the body and the name of that tag.
    fn body(&mut self, ends: &[&str]) -> Result<(Vec<Statement>, String), TemplateError> {
        self.takes_operator(":");
        self.expect(&TemplateToken::BlockEnd)?;
        let body = self.statements(ends)?;
        Ok((body, self.name()?))
    }

    fn statement(&mut self) -> Result<Vec<StatementKind>, TemplateError> {
        let name = self.name()?;
        let kind = match name.as_str() {
            "for" => self.for_loop()?,
            "if" => self.condition()?,
            "set" => self.set()?,
            "with" => self.with()?,
            "macro" => self.macro_definition()?,
            "call" => self.call_block()?,
            "filter" => {
                let mut filters = vec![self.filter()?];
                filters.extend(self.filters()?);
                let (body, _) = self.body(&["endfilter"])?;
                StatementKind::FilterBlock { filters, body }
            }
            "print" => return self.print(),
            "generation" => {
                let loops = std::mem::take(&mut self.loops);
                let parsed = self.body(&["endgeneration"]);
                self.loops = loops;
                StatementKind::Generation(parsed?.0)
            }
            "break" | "continue" if self.loops == 0 => {
                return Err(self.failure(format!("'{name}' outside a loop")));
            }
            "break" => StatementKind::Break,
            "continue" => StatementKind::Continue,
            "autoescape" | "block" | "extends" | "from" | "import" | "include" => {
                return Err(
                    TemplateError::unsupported(&format!("the tag '{name}'")).at(self.line())
                );
            }
            _ => return Err(self.failure(format!("encountered unknown tag '{name}'"))),
        };
        Ok(vec![kind])
    }

    fn print(&mut self) -> Result<Vec<StatementKind>, TemplateError> {
        let mut printed = Vec::new();
        while self.token() != &TemplateToken::BlockEnd {
            if !printed.is_empty() {
                self.expect_operator(",")?;
            }
            printed.push(StatementKind::Print(self.expression()?));
        }
        Ok(printed)
    }

    fn for_loop(&mut self) -> Result<StatementKind, TemplateError> {
        self.fors += 1;
        let parsed = self.target(&["in"]).and_then(|target| {
            self.check_loop_target(&target)?;
            self.for_of(target)
        });
        self.fors -= 1;
        parsed
    }

    /// Rejects assignments to the special variable `loop`, like jinja2.
    fn check_loop_target(&self, target: &AssignTarget) -> Result<(), TemplateError> {
        match target {
            AssignTarget::Name(name) if name == "loop" && self.fors > 0 => {
                Err(self.failure("Can't assign to special loop variable in for-loop target"))
            }
            AssignTarget::Tuple(targets) => targets
                .iter()
                .try_for_each(|target| self.check_loop_target(target)),
            _ => Ok(()),
        }
    }

    fn for_of(&mut self, target: AssignTarget) -> Result<StatementKind, TemplateError> {
        self.expect_name("in")?;
        let items = self.tuple_until(&["recursive"], Self::or)?;
        let filter = if self.takes_name("if") {
            Some(self.expression()?)
        } else {
            None
        };
        let is_recursive = self.takes_name("recursive");
        self.loops += 1;
        let ended = self.body(&["endfor", "else"]);
        self.loops -= 1;
        let (body, end) = ended?;
        let otherwise = match end.as_str() {
            "else" => self.body(&["endfor"])?.0,
            _ => Vec::new(),
        };
        Ok(StatementKind::For(Arc::new(For {
            target,
            items,
            filter,
            is_recursive,
            body,
            otherwise,
        })))
    }

    fn condition(&mut self) -> Result<StatementKind, TemplateError> {
        let (mut branches, mut otherwise) = (Vec::new(), Vec::new());
        loop {
            let test = self.tuple_until(&[], Self::or)?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_str() {
                "elif" => {}
                "else" => {
                    otherwise = self.body(&["endif"])?.0;
                    break;
                }
                _ => break,
            }
        }
        Ok(StatementKind::If(If {
            branches,
            otherwise,
        }))
    }

    fn set(&mut self) -> Result<StatementKind, TemplateError> {
        let target = self.target(&[])?;
        self.check_loop_target(&target)?;
        if self.takes_operator("=") {
            return Ok(StatementKind::Set(target, self.tuple()?));
        }
        let filters = self.filters()?;
        let (body, _) = self.body(&["endset"])?;
        Ok(StatementKind::SetBlock {
            target,
            filters,
            body,
        })
    }

    fn with(&mut self) -> Result<StatementKind, TemplateError> {
        let mut variables = Vec::new();
        while self.token() != &TemplateToken::BlockEnd {
            if !variables.is_empty() {
                self.expect_operator(",")?;
            }
            let target = self.target_primary()?;
            self.expect_operator("=")?;
            variables.push((target, self.expression()?));
        }
        let (body, _) = self.body(&["endwith"])?;
        Ok(StatementKind::With { variables, body })
    }

    fn macro_definition(&mut self) -> Result<StatementKind, TemplateError> {
        let name = self.name()?;
        let parameters = self.parameters()?;
        let defined = self.macro_of(name, parameters, "endmacro")?;
        Ok(StatementKind::Macro(Arc::new(defined)))
    }

    fn call_block(&mut self) -> Result<StatementKind, TemplateError> {
        let parameters = if self.is_operator("(") {
            self.parameters()?
        } else {
            Vec::new()
        };
        let Expression::Call(callee, arguments) = self.expression()? else {
            return Err(self.failure("expected call"));
        };
        let caller = self.macro_of("caller".into(), parameters, "endcall")?;
        Ok(StatementKind::CallBlock {
            callee: *callee,
            arguments: *arguments,
            caller: Arc::new(caller),
        })
    }

    /// Parses the body of a macro.
    fn macro_of(
        &mut self,
        name: String,
        parameters: Vec<(String, Option<Expression>)>,
        end: &str,
    ) -> Result<Macro, TemplateError> {
        let loops = std::mem::take(&mut self.loops);
        let around = std::mem::take(&mut self.takes);
        let parsed = self.body(&[end]);
        self.loops = loops;
        let takes = std::mem::replace(&mut self.takes, around);
        let (body, _) = parsed?;
        // Special variables of an inner macro may also refer to the enclosing one.
        self.takes.caller |= takes.caller;
        self.takes.kwargs |= takes.kwargs;
        self.takes.varargs |= takes.varargs;
        Ok(Macro {
            name,
            parameters,
            body,
            takes,
        })
    }

    fn parameters(&mut self) -> Result<Vec<(String, Option<Expression>)>, TemplateError> {
        self.expect_operator("(")?;
        let mut parameters: Vec<(String, Option<Expression>)> = Vec::new();
        while !self.is_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            let name = self.name()?;
            let default = if self.takes_operator("=") {
                Some(self.expression()?)
            } else {
                None
            };
            let follows_default = parameters
                .last()
                .is_some_and(|(_, default)| default.is_some());
            if default.is_none() && follows_default {
                return Err(self.failure("non-default argument follows default argument"));
            }
            parameters.push((name, default));
        }
        self.expect_operator(")")?;
        Ok(parameters)
    }

    /// Parses an assignment target: one, or several separated by commas, up to a name in `ends`.
    fn target(&mut self, ends: &[&str]) -> Result<AssignTarget, TemplateError> {
        let (mut targets, mut is_tuple) = (Vec::new(), false);
        loop {
            let is_end = matches!(
                self.token(),
                TemplateToken::VariableEnd | TemplateToken::BlockEnd
            ) || self.is_operator(")")
                || self.is_operator("=")
                || ends.iter().any(|end| self.is_name(end));
            if is_end {
                break;
            }
            targets.push(self.target_primary()?);
            if !self.takes_operator(",") {
                break;
            }
            is_tuple = true;
        }
        match targets.pop() {
            Some(only) if targets.is_empty() && !is_tuple => Ok(only),
            Some(last) => {
                targets.push(last);
                Ok(AssignTarget::Tuple(targets))
            }
            None => Err(self.failure("expected something to assign to")),
        }
    }

    fn target_primary(&mut self) -> Result<AssignTarget, TemplateError> {
        if self.takes_operator("(") {
            let target = self.deeper(|parser| parser.target(&[]))?;
            self.expect_operator(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if ["true", "false", "none", "True", "False", "None"].contains(&name.as_str()) {
            return Err(self.failure(format!("cannot assign to '{name}'")));
        }
        if self.takes_operator(".") {
            return Ok(AssignTarget::Attribute(name, self.name()?));
        }
        Ok(AssignTarget::Name(name))
    }

    /// Parses the filters of `|name(arguments)|…`.
    fn filters(&mut self) -> Result<Vec<Filter>, TemplateError> {
        let mut filters = Vec::new();
        while self.takes_operator("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    /// Parses `name(arguments)`.
    fn filter(&mut self) -> Result<Filter, TemplateError> {
        let name = self.dotted()?;
        let arguments = if self.is_operator("(") {
            self.arguments()?
        } else {
            ArgumentList::default()
        };
        Ok(Filter { name, arguments })
    }

    fn dotted(&mut self) -> Result<String, TemplateError> {
        let mut name = self.name()?;
        while self.takes_operator(".") {
            name.push('.');
            name.push_str(&self.name()?);
        }
        Ok(name)
    }
}
